// What can go wrong with a cache on a device, and what it promises then; see test_device_stress.cpp
// for the order of copies and readers.
#include <chrono>
#include <cstdlib>
#include <numeric>
#include <thread>

#include "base/error.h"
#include "cache/device_transport.h"
#include "device_world.h"

using namespace moeinf;
using namespace std::chrono_literals;

namespace {

void test_a_failed_copy_fails_one_step(const CacheWorld& world,
                                       const std::shared_ptr<Device>& device) {
    fake_cuda_reset(1);
    Counts counts;
    auto cache = std::make_shared<ExpertCache>(world.catalog,
                                               device_options(world, device, 4, 80, false, false));
    Reader reader(world, cache, device, counts, 5);
    int64_t asked = reader.step(3);
    const int64_t before = asked;
    fake_cuda_fail("cuMemcpyHtoDAsync_v2", 1, 1);
    bool failed = false;
    for (int i = 0; i < 20 && !failed; ++i) {
        try {
            asked += reader.step(3);
        } catch (const Error& error) {
            failed = std::string(error.what()).find("cuMemcpyHtoDAsync") != std::string::npos;
        }
    }
    CHECK(failed);
    for (int i = 0; i < 20; ++i) asked += reader.step(3);
    reader.reader().synchronize();
    CHECK(asked > before);
    CHECK_EQ(counts.wrong.load(), 0);
}

void test_pinned_memory_refused(const CacheWorld& world, const std::shared_ptr<Device>& device) {
    fake_cuda_reset(1);
    fake_cuda_set_pinned_limit(40 * CacheWorld::kSlotBytes);
    auto cache = std::make_shared<ExpertCache>(world.catalog,
                                               device_options(world, device, 4, 80, false, false));
    const HostTierStats stats = cache->device_transport()->host().stats();
    CHECK(stats.slots >= HostTier::kLeastSlots && stats.slots <= 40);
    CHECK_EQ(stats.slots + stats.slots_refused, 80);
    fake_cuda_reset(1);
}

void test_resize_without_memory_keeps_the_size(const CacheWorld& world,
                                               const std::shared_ptr<Device>& device) {
    fake_cuda_reset(1);
    fake_cuda_set_granularity(4096);
    auto cache = std::make_shared<ExpertCache>(world.catalog,
                                               device_options(world, device, 4, 80, false, false));
    Counts counts;
    Reader reader(world, cache, device, counts, 9);
    fake_cuda_set_memory(fake_cuda_used_bytes() + 5 * CacheWorld::kSlotBytes);
    bool refused = false;
    try {
        cache->resize(60);
    } catch (const Error& error) {
        refused = error.code() == ErrorCode::kCapacity;
    }
    CHECK(refused);
    CHECK_EQ(cache->slots(), 4);
    cache->resize(6);
    int64_t asked = 0;
    for (int i = 0; i < 50; ++i) asked += reader.step(4);
    reader.reader().synchronize();
    CHECK_EQ(counts.seen.load(), asked);
    CHECK_EQ(counts.wrong.load(), 0);
    fake_cuda_reset(1);
}

// What leaves the device is found again in RAM: once all experts have been read, the files rest.
void test_exclusive_tiers_add_up(const CacheWorld& world, const std::shared_ptr<Device>& device) {
    fake_cuda_reset(1);
    auto cache = std::make_shared<ExpertCache>(world.catalog,
                                               device_options(world, device, 40, 60, true, false));
    Counts counts;
    Reader reader(world, cache, device, counts, 11);
    for (int i = 0; i < 200; ++i) reader.step(8);
    cache->reset_stats();
    for (int i = 0; i < 200; ++i) reader.step(8);
    reader.reader().synchronize();
    CHECK_EQ(cache->device_transport()->host().stats().read_bytes, 0);
    CHECK(cache->device_transport()->link_stats().demoted_bytes > 0);
    CHECK_EQ(counts.wrong.load(), 0);
}

// What only passed through the device has not come to stay: RAM lets go of what did.
void test_what_passes_through_stays_in_ram(const CacheWorld& world,
                                           const std::shared_ptr<Device>& device) {
    fake_cuda_reset(1);
    auto cache = std::make_shared<ExpertCache>(world.catalog,
                                               device_options(world, device, 20, 70, true, false));
    std::vector<int32_t> all(kDeviceExperts);
    std::iota(all.begin(), all.end(), 0);
    const auto step = [&](int32_t layer, std::span<const int32_t> experts) {
        StepLease lease = cache->begin({.layer = layer, .experts = experts});
        std::vector<ReadyExpert> ready;
        while (lease.next(ready)) {
            for (const ReadyExpert& one : ready) {
                RowFences& fences = cache->device_transport()->fences();
                while (!fences.arrived(one.slot)) std::this_thread::sleep_for(20us);
                lease.done(one.position);
            }
            ready.clear();
        }
        std::this_thread::sleep_for(2ms);  // until RAM has been told of what has arrived
    };
    for (int32_t layer = 0; layer < kDeviceLayers; ++layer) step(layer, all);
    cache->reset_stats();
    for (int32_t first = 0; first < 40; first += 5) {
        for (int32_t layer = 0; layer < kDeviceLayers; ++layer) {
            step(layer, std::span(all).subspan(static_cast<size_t>(first), 5));
        }
    }
    CHECK_EQ(cache->device_transport()->host().stats().read_bytes, 0);
}

// A queue full of prefetches on a slow link: of what was not yet on its way when the demand was
// enqueued, nothing goes first.
void test_a_demand_overtakes(const CacheWorld& world, const std::shared_ptr<Device>& device) {
    fake_cuda_reset(1);
    auto cache = std::make_shared<ExpertCache>(world.catalog,
                                               device_options(world, device, 80, 80, false, false));
    Counts counts;
    Reader reader(world, cache, device, counts, 3);
    fake_cuda_set_link(FAKE_CUDA_TO_DEVICE, 5e6, 0);  // 2 ms each
    std::vector<int32_t> others;
    for (int32_t i = 0; i < kDeviceExperts; ++i) others.push_back(i);
    (void)cache->prefetch(0, others);
    std::this_thread::sleep_for(20ms);
    (void)reader.step(1, 1);  // of the other layer
    reader.reader().synchronize();
    std::vector<fake_cuda_copy> copies(256);
    copies.resize(fake_cuda_copies(copies.data(), copies.size()));
    const auto urgent =
        std::min_element(copies.begin(), copies.end(),
                         [](const auto& a, const auto& b) { return a.priority < b.priority; });
    CHECK(urgent != copies.end());
    const auto overtook = std::count_if(copies.begin(), copies.end(), [&](const auto& copy) {
        return copy.direction == FAKE_CUDA_TO_DEVICE && copy.start_ns > urgent->enqueued_ns &&
               copy.start_ns < urgent->start_ns;
    });
    CHECK(overtook <= 1);
    CHECK_EQ(counts.wrong.load(), 0);
    fake_cuda_reset(1);
}

void test_a_copy_that_never_ends(const CacheWorld& world, const std::shared_ptr<Device>& device) {
    fake_cuda_reset(1);
    auto cache = std::make_shared<ExpertCache>(world.catalog,
                                               device_options(world, device, 4, 80, false, false));
    fake_cuda_hang_next_event();
    const std::vector<int32_t> some{1, 2};
    (void)cache->prefetch(0, some);
    std::this_thread::sleep_for(20ms);
    std::thread rescue([] {
        std::this_thread::sleep_for(200ms);
        fake_cuda_reset(2);
    });
    cache.reset();  // returns, at the latest when it gives up
    rescue.join();
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
    std::cout << "seed " << seed << "\n";
    const auto device = open_cuda_device(0);
    const CacheWorld world(kDeviceLayers, kDeviceExperts, seed);
    test_a_failed_copy_fails_one_step(world, device);
    test_pinned_memory_refused(world, device);
    test_resize_without_memory_keeps_the_size(world, device);
    test_exclusive_tiers_add_up(world, device);
    test_what_passes_through_stays_in_ram(world, device);
    test_a_demand_overtakes(world, device);
    test_a_copy_that_never_ends(world, device);
    return test_result();
}
