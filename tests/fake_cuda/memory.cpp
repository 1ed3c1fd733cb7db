// Device memory (RAM that cannot be accessed until it is mapped) and page-locked RAM.
#include <sys/mman.h>

#include <cstring>
#include <map>
#include <numeric>
#include <shared_mutex>

#include "context.h"
#include "fake.h"

namespace fake {
namespace {

constexpr int kGarbage = 0xA5;  // what fresh device memory holds

struct Allocation {
    size_t nbytes;
    int device;
    int references;
};

struct Mapping {
    size_t nbytes;
    uint64_t allocation;
    bool accessible;
};

struct Registration {
    size_t nbytes;
    int device;  // -1: portable, so every device's
};

// The head of CUmemAllocationProp.
struct Properties {
    int type, handle_types, location_type, device;
};

constexpr unsigned kPortable = 1;

struct Memory {
    std::shared_mutex mutex;  // guards all below; shared while bytes are copied
    std::map<uint64_t, Allocation> allocations;
    std::map<uint64_t, Mapping> mappings;
    std::map<uint64_t, size_t> reservations;
    std::map<uint64_t, Registration> registrations;
    uint64_t last_allocation = 0;
    uint64_t used[kMaxDevices]{};
    uint64_t registered = 0;
};

Memory& memory() {
    static Memory* const all = new Memory;
    return *all;
}

template <typename Value>
auto at_or_before(const std::map<uint64_t, Value>& map, uint64_t address) {
    auto found = map.upper_bound(address);
    return found == map.begin() ? map.end() : std::prev(found);
}

// The caller holds the mutex.
bool is_mapped(uint64_t address, uint64_t nbytes, int device) {
    auto found = at_or_before(memory().mappings, address);
    const uint64_t end = address + nbytes;
    while (found != memory().mappings.end()) {
        const uint64_t mapping_end = found->first + found->second.nbytes;
        if (found->first > address || mapping_end <= address || !found->second.accessible) break;
        if (memory().allocations.at(found->second.allocation).device != device) break;
        if (mapping_end >= end) return true;
        address = mapping_end;
        ++found;
    }
    return false;
}

bool is_registered(uint64_t address, uint64_t nbytes, int device) {
    auto found = at_or_before(memory().registrations, address);
    return found != memory().registrations.end() &&
           (found->second.device < 0 || found->second.device == device) &&
           address + nbytes <= found->first + found->second.nbytes;
}

// Outside of every reservation lies device memory of other libraries: tensors of torch, whose
// device here is the CPU.
bool is_foreign(uint64_t address, uint64_t nbytes, int device) {
    const auto found = at_or_before(memory().reservations, address + nbytes - 1);
    const bool reserved =
        found != memory().reservations.end() && found->first + found->second > address;
    return !reserved && !is_registered(address, 1, device);
}

bool is_copyable(const Part& part, int direction, int device) {
    if (part.nbytes == 0) return true;
    const bool in = direction == FAKE_CUDA_TO_DEVICE;
    const uint64_t there = in ? part.target : part.source;
    return (is_mapped(there, part.nbytes, device) || is_foreign(there, part.nbytes, device)) &&
           is_registered(in ? part.source : part.target, part.nbytes, device);
}

void drop_reference(uint64_t handle) {
    auto found = memory().allocations.find(handle);
    if (--found->second.references > 0) return;
    memory().used[found->second.device] -= found->second.nbytes;
    memory().allocations.erase(found);
}

bool in_granules(uint64_t nbytes) {
    return nbytes > 0 && nbytes % settings().granularity == 0;
}

}  // namespace

bool copyable(const Part& part, int direction, int device) {
    const std::shared_lock lock(memory().mutex);
    return is_copyable(part, direction, device);
}

bool copy_bytes(const std::vector<Part>& parts, int direction, int device) {
    const std::shared_lock lock(memory().mutex);
    if (is_broken(device)) return true;
    for (const Part& part : parts) {
        if (!is_copyable(part, direction, device)) return false;
        std::memcpy(reinterpret_cast<void*>(part.target), reinterpret_cast<void*>(part.source),
                    part.nbytes);
    }
    return true;
}

void wait_for_copies() {
    const std::lock_guard lock(memory().mutex);
}

}  // namespace fake

using namespace fake;

FAKE_CALL(cuMemGetInfo_v2, kContext, (size_t* free, size_t* total)) {
    FAKE_ENTER(cuMemGetInfo_v2);
    const std::shared_lock lock(memory().mutex);
    const int device = current_device();
    *total = settings().memory[device];
    *free = *total > memory().used[device] ? *total - memory().used[device] : 0;
    return kSuccess;
}

FAKE_CALL(cuMemGetAllocationGranularity, kContext, (size_t* granularity, const void*, int)) {
    FAKE_ENTER(cuMemGetAllocationGranularity);
    *granularity = settings().granularity;
    return kSuccess;
}

FAKE_CALL(cuMemAddressReserve, kContext,
          (DevicePointer * pointer, size_t nbytes, size_t, DevicePointer, unsigned long long)) {
    FAKE_ENTER(cuMemAddressReserve);
    if (!in_granules(nbytes)) return kInvalidValue;
    void* range =
        mmap(nullptr, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) return kOutOfMemory;
    *pointer = reinterpret_cast<DevicePointer>(range);
    const std::lock_guard lock(memory().mutex);
    memory().reservations[*pointer] = nbytes;
    return kSuccess;
}

FAKE_CALL(cuMemAddressFree, kContext, (DevicePointer pointer, size_t nbytes)) {
    FAKE_ENTER(cuMemAddressFree);
    const std::lock_guard lock(memory().mutex);
    auto found = memory().reservations.find(pointer);
    if (found == memory().reservations.end() || found->second != nbytes) return kInvalidValue;
    auto mapping = memory().mappings.lower_bound(pointer);
    if (mapping != memory().mappings.end() && mapping->first < pointer + nbytes) {
        return kInvalidValue;
    }
    munmap(reinterpret_cast<void*>(pointer), nbytes);
    memory().reservations.erase(found);
    return kSuccess;
}

FAKE_CALL(cuMemCreate, kContext,
          (unsigned long long* handle, size_t nbytes, const void* properties, unsigned long long)) {
    FAKE_ENTER(cuMemCreate);
    if (!in_granules(nbytes)) return kInvalidValue;
    const int device = static_cast<const Properties*>(properties)->device;
    if (device < 0 || device >= settings().devices) return kInvalidDevice;
    const std::lock_guard lock(memory().mutex);
    if (memory().used[device] + nbytes > settings().memory[device]) return kOutOfMemory;
    memory().used[device] += nbytes;
    *handle = ++memory().last_allocation;
    memory().allocations[*handle] = {nbytes, device, 1};
    return kSuccess;
}

FAKE_CALL(cuMemRelease, kContext, (unsigned long long handle)) {
    FAKE_ENTER(cuMemRelease);
    const std::lock_guard lock(memory().mutex);
    if (memory().allocations.count(handle) == 0) return kInvalidValue;
    drop_reference(handle);
    return kSuccess;
}

FAKE_CALL(cuMemMap, kContext,
          (DevicePointer pointer, size_t nbytes, size_t offset, unsigned long long handle,
           unsigned long long)) {
    FAKE_ENTER(cuMemMap);
    const std::lock_guard lock(memory().mutex);
    auto allocation = memory().allocations.find(handle);
    auto range = at_or_before(memory().reservations, pointer);
    auto next = memory().mappings.lower_bound(pointer);
    auto before = at_or_before(memory().mappings, pointer);
    if (allocation == memory().allocations.end() || allocation->second.nbytes != nbytes ||
        offset != 0 || range == memory().reservations.end() ||
        pointer + nbytes > range->first + range->second ||
        (next != memory().mappings.end() && next->first < pointer + nbytes) ||
        (before != memory().mappings.end() && before->first + before->second.nbytes > pointer)) {
        return kInvalidValue;
    }
    ++allocation->second.references;
    memory().mappings[pointer] = {nbytes, handle, false};
    return kSuccess;
}

FAKE_CALL(cuMemSetAccess, kContext, (DevicePointer pointer, size_t nbytes, const void*, size_t)) {
    FAKE_ENTER(cuMemSetAccess);
    const std::lock_guard lock(memory().mutex);
    auto found = memory().mappings.find(pointer);
    if (found == memory().mappings.end() || found->second.nbytes != nbytes) return kInvalidValue;
    void* range = reinterpret_cast<void*>(pointer);
    if (mprotect(range, nbytes, PROT_READ | PROT_WRITE) != 0) return kOutOfMemory;
    std::memset(range, kGarbage, nbytes);
    found->second.accessible = true;
    return kSuccess;
}

FAKE_CALL(cuMemUnmap, kContext, (DevicePointer pointer, size_t nbytes)) {
    FAKE_ENTER(cuMemUnmap);
    const std::lock_guard lock(memory().mutex);
    auto found = memory().mappings.find(pointer);
    if (found == memory().mappings.end() || found->second.nbytes != nbytes) return kInvalidValue;
    madvise(reinterpret_cast<void*>(pointer), nbytes, MADV_DONTNEED);
    mprotect(reinterpret_cast<void*>(pointer), nbytes, PROT_NONE);
    const uint64_t allocation = found->second.allocation;
    memory().mappings.erase(found);
    drop_reference(allocation);
    return kSuccess;
}

FAKE_CALL(cuMemHostRegister_v2, kContext, (void* host, size_t nbytes, unsigned flags)) {
    FAKE_ENTER(cuMemHostRegister_v2);
    const auto address = reinterpret_cast<uint64_t>(host);
    const std::lock_guard lock(memory().mutex);
    if (nbytes == 0) return kInvalidValue;
    auto next = memory().registrations.lower_bound(address);
    auto before = at_or_before(memory().registrations, address);
    if ((next != memory().registrations.end() && next->first < address + nbytes) ||
        (before != memory().registrations.end() &&
         before->first + before->second.nbytes > address)) {
        return kAlreadyRegistered;
    }
    if (nbytes > settings().pinned_limit ||
        memory().registered > settings().pinned_limit - nbytes) {
        return kOutOfMemory;
    }
    const bool portable = (flags & kPortable) != 0;
    memory().registrations[address] = {nbytes, portable ? -1 : current_device()};
    memory().registered += nbytes;
    return kSuccess;
}

FAKE_CALL(cuMemHostUnregister, kContext, (void* host)) {
    FAKE_ENTER(cuMemHostUnregister);
    const std::lock_guard lock(memory().mutex);
    auto found = memory().registrations.find(reinterpret_cast<uint64_t>(host));
    if (found == memory().registrations.end()) return kNotRegistered;
    memory().registered -= found->second.nbytes;
    memory().registrations.erase(found);
    return kSuccess;
}

FAKE_CALL(cuMemHostGetDevicePointer_v2, kContext, (DevicePointer * pointer, void* host, unsigned)) {
    FAKE_ENTER(cuMemHostGetDevicePointer_v2);
    const std::shared_lock lock(memory().mutex);
    *pointer = reinterpret_cast<DevicePointer>(host);
    return is_registered(*pointer, 1, current_device()) ? kSuccess : kInvalidValue;
}

FAKE_EXPORT uint64_t fake_cuda_used_bytes(void) {
    const std::shared_lock lock(memory().mutex);
    return std::accumulate(std::begin(memory().used), std::end(memory().used), uint64_t{0});
}

FAKE_EXPORT uint64_t fake_cuda_registered_bytes(void) {
    const std::shared_lock lock(memory().mutex);
    return memory().registered;
}
