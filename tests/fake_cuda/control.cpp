// The control functions, the way into every call, and the state of the whole driver.
#include <cstdio>
#include <cstring>

#include "context.h"
#include "fake.h"

namespace fake {
namespace {

std::atomic<Result> broken[kMaxDevices];

}  // namespace

Settings& settings() {
    static Settings* const all = [] {
        auto* const fresh = new Settings;  // streams may outlive every static object
        for (auto& memory : fresh->memory) memory = kMemory;
        return fresh;
    }();
    return *all;
}

std::vector<Call*>& all_calls() {
    static auto* const calls = new std::vector<Call*>;
    return *calls;
}

Call::Call(const char* call_name, Needs needs) : name(call_name), needs_(needs) {
    all_calls().push_back(this);
}

Result Call::enter() {
    count.fetch_add(1, std::memory_order_relaxed);
    uint64_t left = until_failure_.load(std::memory_order_relaxed);
    while (left > 0) {
        if (!until_failure_.compare_exchange_weak(left, left - 1, std::memory_order_relaxed)) {
            continue;
        }
        if (left == 1) return failure_.load(std::memory_order_relaxed);
        break;
    }
    if (needs_ == Needs::kNothing) return kSuccess;
    if (!initialized_here()) return kNotInitialized;
    if (needs_ == Needs::kContext) {
        const int device = current_device();
        if (device < 0) return kInvalidContext;
        return broken[device].load(std::memory_order_relaxed);
    }
    return kSuccess;
}

void Call::reset() {
    count.store(0, std::memory_order_relaxed);
    until_failure_.store(0, std::memory_order_relaxed);
}

void Call::fail(uint64_t nth, Result result) {
    failure_.store(result, std::memory_order_relaxed);
    until_failure_.store(nth, std::memory_order_relaxed);
}

void break_context(int device, Result result, const char* why) {
    Result whole = kSuccess;  // the first fault is the one to look at
    if (broken[device].compare_exchange_strong(whole, result)) {
        std::fprintf(stderr, "fake CUDA: device %d: %s\n", device, why);
    }
}

bool is_broken(int device) {
    return broken[device].load(std::memory_order_relaxed) != kSuccess;
}

void mend_contexts() {
    for (std::atomic<Result>& one : broken) one.store(kSuccess, std::memory_order_relaxed);
}

}  // namespace fake

using fake::settings;

// By this name the library is known to be no real driver.
FAKE_EXPORT const int moeinf_fake_cuda = 1;

FAKE_EXPORT void fake_cuda_reset(uint64_t seed) {
    const fake::Settings fresh;
    fake::Settings& all = settings();
    all.seed = seed;
    fake_cuda_set_memory(fake::kMemory);
    all.granularity = fresh.granularity.load();
    all.pinned_limit = fresh.pinned_limit.load();
    all.max_delay_ns = fresh.max_delay_ns.load();
    all.version = fresh.version.load();
    all.devices = fresh.devices.load();
    all.same_addresses = fresh.same_addresses.load();
    all.at_once = fresh.at_once.load();
    all.capturing = fresh.capturing.load();
    for (int direction = 0; direction < 2; ++direction) fake_cuda_set_link(direction, 0, 0);
    for (fake::Call* call : fake::all_calls()) call->reset();
    fake::mend_contexts();
    fake::release_hung_events();
    fake::reset_links();
}

FAKE_EXPORT void fake_cuda_set_memory(uint64_t total_bytes) {
    for (int device = 0; device < fake::kMaxDevices; ++device) {
        fake_cuda_set_device_memory(device, total_bytes);
    }
}

FAKE_EXPORT void fake_cuda_set_device_memory(int device, uint64_t total_bytes) {
    settings().memory[device] = total_bytes;
}

FAKE_EXPORT void fake_cuda_break_device(int device, int result) {
    fake::break_context(device, result, "broken by a test");
    fake::wait_for_copies();
}

FAKE_EXPORT void fake_cuda_set_granularity(uint64_t bytes) {
    settings().granularity = bytes;
}

FAKE_EXPORT void fake_cuda_set_pinned_limit(uint64_t bytes) {
    settings().pinned_limit = bytes;
}

FAKE_EXPORT void fake_cuda_set_driver_version(int version) {
    settings().version = version;
}

FAKE_EXPORT void fake_cuda_set_device_count(int count) {
    settings().devices = count;
}

FAKE_EXPORT void fake_cuda_set_same_addresses(int same) {
    settings().same_addresses = same;
}

FAKE_EXPORT void fake_cuda_set_at_once(int at_once) {
    settings().at_once = at_once;
}

FAKE_EXPORT void fake_cuda_set_capturing(int capturing) {
    settings().capturing = capturing;
}

FAKE_EXPORT void fake_cuda_set_link(int direction, double bytes_per_second, uint64_t latency_ns) {
    settings().links[direction].bytes_per_second = bytes_per_second;
    settings().links[direction].latency_ns = latency_ns;
}

FAKE_EXPORT void fake_cuda_set_max_delay(uint64_t ns) {
    settings().max_delay_ns = ns;
}

FAKE_EXPORT int fake_cuda_fail(const char* function, uint64_t nth, int result) {
    for (fake::Call* call : fake::all_calls()) {
        if (std::strcmp(call->name, function) != 0) continue;
        call->fail(nth, result);
        return 0;
    }
    return -1;
}

FAKE_EXPORT uint64_t fake_cuda_calls(const char* function) {
    uint64_t count = 0;
    for (const fake::Call* call : fake::all_calls()) {
        if (function == nullptr || std::strcmp(call->name, function) == 0) count += call->count;
    }
    return count;
}
