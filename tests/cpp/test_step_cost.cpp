// Host cost of a step whose experts are all resident: no allocation from begin() to release(), for
// any policy. Prints its time, and the allocations of a step that misses.
#include <chrono>
#include <cstdlib>
#include <new>

#include "cache/stream_step.h"
#include "cache_world.h"
#include "check.h"
#include "cuda/cuda.h"
#include "watched_device.h"

using namespace moeinf;
using Clock = std::chrono::steady_clock;

namespace {

// Of this thread. A driver's own allocations do not count: see Watch.
thread_local int64_t allocations = 0;
thread_local bool in_driver = false;

}  // namespace

void* operator new(size_t nbytes) {
    if (!in_driver) ++allocations;
    void* const memory = std::malloc(nbytes);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}
void* operator new(size_t nbytes, const std::nothrow_t&) noexcept {
    if (!in_driver) ++allocations;
    return std::malloc(nbytes);
}
void operator delete(void* memory) noexcept {
    std::free(memory);
}
void operator delete(void* memory, size_t) noexcept {
    std::free(memory);
}
void operator delete(void* memory, const std::nothrow_t&) noexcept {
    std::free(memory);
}

namespace {

constexpr int32_t kLayers = 2;
constexpr int32_t kExperts = 40;
constexpr int32_t kSteps = 300;

class Watch final : public DeviceWatcher {
public:
    void call_begins() override {
        in_driver = true;
        began = Clock::now();
    }
    void call_ends() override {
        spent += Clock::now() - began;
        ++calls;
        in_driver = false;
    }
    static thread_local Clock::duration spent;  // of this thread
    static thread_local int64_t calls;

private:
    static thread_local Clock::time_point began;
};
thread_local Clock::duration Watch::spent{};
thread_local int64_t Watch::calls = 0;
thread_local Clock::time_point Watch::began;

double microseconds(Clock::duration time) {
    return std::chrono::duration<double, std::micro>(time).count();
}

void report(const std::string& what, int64_t allocated, Clock::duration took) {
    std::cout << what << ", per step: " << double(allocated) / kSteps << " allocations, "
              << microseconds(took) / kSteps << " us";
    if (Watch::calls > 0) {
        std::cout << ", of which " << microseconds(Watch::spent) / kSteps << " us in "
                  << double(Watch::calls) / kSteps << " calls of the device";
    }
    std::cout << "\n";
}

// Runs `step` until everything has found its place, then counts.
template <typename Step>
int64_t allocated_by(const std::string& what, Step step) {
    for (int32_t i = 0; i < kSteps; ++i) step(i);
    Watch::calls = 0;
    Watch::spent = {};
    const int64_t before = allocations;
    const auto start = Clock::now();
    for (int32_t i = 0; i < kSteps; ++i) step(i);
    const auto took = Clock::now() - start;
    const int64_t allocated = allocations - before;
    report(what, allocated, took);
    return allocated;
}

void test_in_ram(const CacheWorld& world, const std::string& policy) {
    ExpertCache cache = world.cache(kLayers * kExperts, policy);
    Experts experts(8);
    std::vector<ReadyExpert> ready;
    const auto step = [&](int32_t i) {
        for (int32_t e = 0; e < 8; ++e)
            experts[size_t(e)] = ExpertIndex{(5 * i + 3 * e) % kExperts};
        StepLease lease = cache.begin_step({.layer = LayerId{i % kLayers}, .experts = experts});
        while (lease.wait_ready(ready)) {
            for (const ReadyExpert& one : ready) lease.release(one.position);
            ready.clear();
        }
        lease.release();
    };
    CHECK_EQ(allocated_by("RAM, " + policy, step), int64_t{0});
}

void test_on_a_device(const CacheWorld& world, const std::shared_ptr<Device>& device,
                      const std::string& policy, int32_t width, int32_t slots) {
    ExpertCacheOptions options = world.options(slots, policy);
    options.device = device;
    options.host_slots = kLayers * kExperts;
    auto cache = std::make_shared<ExpertCache>(world.catalog, options);
    const Stream stream = device->create_stream(false);
    const auto shared = device->make_arena(1 << 16);
    shared->commit(1 << 16);
    auto* const ids = reinterpret_cast<int32_t*>(shared->data());
    const bool all_resident = slots == kLayers * kExperts;
    {
        StepStream reader(cache, stream);
        const auto step = [&](int32_t i) {
            for (int32_t e = 0; e < width; ++e) ids[e] = (5 * i + 3 * e) % kExperts;
            reader.copy_ids({.layer = LayerId{i % kLayers},
                             .ids = shared->data(),
                             .tokens = 1,
                             .top_k = width,
                             .map = shared->data() + 4096 * sizeof(int32_t)});
            auto wave = reader.begin();
            while (wave) wave = reader.next();
        };
        const int64_t allocated = allocated_by("device, " + policy + ", " + std::to_string(width) +
                                                   " experts, " + std::to_string(slots) + " slots",
                                               step);
        if (all_resident) CHECK_EQ(allocated, int64_t{0});
        reader.synchronize();
    }
    device->destroy_stream(stream);
}

}  // namespace

int main() {
    const CacheWorld world(kLayers, kExperts, drawn_seed());
    for (const std::string& policy : policy_names()) test_in_ram(world, policy);
    Watch watch;
    const auto device = std::make_shared<WatchedDevice>(open_cuda_device(0), watch);
    for (const std::string& policy : policy_names()) {
        test_on_a_device(world, device, policy, 8, kLayers * kExperts);
    }
    test_on_a_device(world, device, "lru", 30, kLayers * kExperts);
    test_on_a_device(world, device, "lru", 8, 8);  // misses only, all of them found in RAM
    return test_result();
}
