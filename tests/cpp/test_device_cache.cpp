// What can go wrong with a cache on a device, and what it promises then; see test_device_stress.cpp
// for the order of copies and readers.
#include <chrono>
#include <cstdlib>
#include <thread>

#include "base/error.h"
#include "device_world.h"
#include "tier/device_link.h"
#include "watched_device.h"

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
    const HostTierStats stats = cache->device_link()->host().stats();
    CHECK(stats.slots >= HostTier::kMinSlots && stats.slots <= 40);
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
    CHECK_EQ(cache->device_link()->host().stats().read_bytes, 0);
    CHECK(cache->device_link()->stats().demoted_bytes > 0);
    CHECK_EQ(counts.wrong.load(), 0);
}

// What only passed through the device has not come to stay: RAM lets go of what did.
void test_what_passes_through_stays_in_ram(const CacheWorld& world,
                                           const std::shared_ptr<Device>& device) {
    fake_cuda_reset(1);
    ExpertCache cache(world.catalog, device_options(world, device, 20, 70, true, false));
    Stepper stepper{world, cache};
    for (int32_t layer = 0; layer < kDeviceLayers; ++layer) stepper.step(layer, ids(0, 40));
    cache.reset_stats();
    for (int32_t first = 0; first < 40; first += 5) {
        for (int32_t layer = 0; layer < kDeviceLayers; ++layer) stepper.step(layer, ids(first, 5));
    }
    CHECK_EQ(stepper.host().read_bytes, 0);
    CHECK_EQ(stepper.wrong, 0);
}

// Eight slots over RAM for all others and for four that are under way; every expert in one of the
// two, and the last ones of both layers on the device.
struct FullTiers {
    static constexpr int32_t kSlots = 8;
    explicit FullTiers(const CacheWorld& world, const std::shared_ptr<Device>& device)
        : cache(world.catalog, device_options(world, device, kSlots,
                                              kDeviceLayers * kDeviceExperts - 4, true, false)),
          stepper{world, cache} {
        for (int32_t i = 0; i < 2 * kDeviceExperts; ++i) {
            for (int32_t layer = 0; layer < kDeviceLayers; ++layer) {
                stepper.step(layer, ids(i % kDeviceExperts, 1));
            }
        }
        cache.reset_stats();
        fake_cuda_reset(1);
    }
    ExpertCache cache;
    Stepper stepper;
};

// Both directions at once: an expert is on its way before the one it replaces has gone, unless that
// has the only row to come to. Shown once, by taking each out in turn: this test fails without
// - the exchange of slots in Tier::evict_for (the first waits for a copy out),
// - read() in DeviceLink::demote (the third does not wait, and RAM gets its bytes).
void test_a_demotion_holds_up_nobody(const CacheWorld& world,
                                     const std::shared_ptr<Device>& device) {
    FullTiers tiers(world, device);
    fake_cuda_set_link(FAKE_CUDA_TO_DEVICE, 5e6, 0);   // 2 ms each
    fake_cuda_set_link(FAKE_CUDA_TO_HOST, 1.25e6, 0);  // 9 ms
    tiers.stepper.step(0, ids(0, 4));
    std::vector<fake_cuda_copy> copies(256), in, out;
    copies.resize(fake_cuda_copies(copies.data(), copies.size()));
    for (const fake_cuda_copy& copy : copies) {
        (copy.direction == FAKE_CUDA_TO_DEVICE ? in : out).push_back(copy);
    }
    CHECK_EQ(in.size(), 4u);
    CHECK(!out.empty());
    if (in.size() == 4 && !out.empty()) {
        for (size_t i = 0; i < ExpertCache::kStagingSlots; ++i) {
            CHECK(in[i].start_ns < out[0].end_ns);
        }
        CHECK_EQ(in[2].target, out[0].source);
        CHECK(in[2].start_ns >= out[0].end_ns);
    }
    fake_cuda_reset(1);
    for (int32_t layer = 0; layer < kDeviceLayers; ++layer) {
        tiers.stepper.step(layer, ids(36, 4));  // those that left, out of RAM
    }
    CHECK_EQ(tiers.stepper.host().read_bytes, 0);
    CHECK_EQ(tiers.stepper.wrong, 0);
}

// From the moment that a demotion is noted until its copy has been enqueued, which is when the
// row's fences know of it, the link says that it is not idle: a shrinking pool gives no row
// back. Shown once: fails without has_commands() in DeviceLink::is_idle, and if Source::flush
// clears it first.
void test_a_row_is_not_idle_before_its_copy_out(const CacheWorld& world,
                                                const std::shared_ptr<Device>& device) {
    struct Watch final : DeviceWatcher {
        void call_begins() override {
            if (std::this_thread::get_id() == thread) idle = idle || link->is_idle(SlotId{0});
        }
        void call_ends() override {}
        std::atomic<std::thread::id> thread;
        DeviceLink* link = nullptr;
        bool idle = false;
    } watch;
    FullTiers tiers(world, std::make_shared<WatchedDevice>(device, watch));
    watch.link = tiers.cache.device_link();
    CHECK(watch.link->is_idle(SlotId{0}));
    watch.link->on_evict(ExpertId{kDeviceExperts - FullTiers::kSlots / 2},
                         SlotId{ExpertCache::kStagingSlots});
    CHECK(!watch.link->is_idle(SlotId{0}));
    watch.thread = std::this_thread::get_id();
    watch.link->flush();
    watch.thread = std::thread::id();
    CHECK(!watch.idle);
    CHECK(watch.link->stats().demoted_bytes > 0);
}

// Then the files still have it.
void test_a_demotion_that_fails_loses_nothing(const CacheWorld& world,
                                              const std::shared_ptr<Device>& device) {
    FullTiers tiers(world, device);
    fake_cuda_fail("cuMemcpyDtoHAsync_v2", 1, 1);
    tiers.stepper.step(0, ids(0, 1));
    CHECK_EQ(tiers.cache.device_link()->stats().demoted_bytes, 0);
    tiers.stepper.step(0, ids(36, 1));
    CHECK(tiers.stepper.host().read_bytes > 0);
    for (int32_t layer = 0; layer < kDeviceLayers; ++layer) tiers.stepper.step(layer, ids(0, 40));
    CHECK_EQ(tiers.stepper.wrong, 0);
}

// Any row may be the one that an expert passes through. If it goes, its lease keeps this thread
// from shrinking; if it stays, so do its bytes.
void test_a_leased_row_outlives_a_resize(const CacheWorld& world,
                                         const std::shared_ptr<Device>& device) {
    FullTiers tiers(world, device);
    constexpr int32_t kFewer = 4;
    int32_t refused = 0, shrunk = 0;
    for (int32_t i = 0; i < 500 && (refused == 0 || shrunk == 0); ++i) {
        const Experts experts = ids(i * 7 % 30, FullTiers::kSlots + 1);
        for (int32_t other = 0; other < 3; ++other) {
            tiers.stepper.step(1 - i % 2, ids((i * 11 + other * 8) % 30, 6));
        }
        tiers.stepper.step(i % 2, std::span(experts).first(5));
        StepLease lease = tiers.cache.begin_step({.layer = LayerId{i % 2}, .experts = experts});
        std::vector<ReadyExpert> ready;
        while (lease.wait_ready(ready)) {
        }
        const std::vector<ExpertIndex> kept = tiers.cache.resident(LayerId{i % 2});
        const ReadyExpert passing = *std::find_if(ready.begin(), ready.end(), [&](const auto& one) {
            const ExpertIndex expert = experts[static_cast<size_t>(one.position)];
            return std::find(kept.begin(), kept.end(), expert) == kept.end();
        });
        for (const ReadyExpert& one : ready) {
            tiers.stepper.wait_for(one.slot);
            if (one.position != passing.position) lease.release(one.position);
        }
        bool fits = true;
        try {
            tiers.cache.resize(kFewer);
        } catch (const Error& error) {
            CHECK(error.code() == ErrorCode::kCapacity);
            fits = false;
        }
        CHECK_EQ(fits, passing.slot < SlotId{kFewer + ExpertCache::kStagingSlots});
        CHECK_EQ(tiers.cache.slots(), fits ? kFewer : FullTiers::kSlots);
        ++(fits ? shrunk : refused);
        CHECK(world.holds(tiers.cache, passing.slot, i % 2,
                          experts[static_cast<size_t>(passing.position)]));
        lease.release();
        tiers.cache.resize(FullTiers::kSlots);
    }
    CHECK(refused > 0);
    CHECK(shrunk > 0);
    CHECK_EQ(tiers.stepper.wrong, 0);
}

// A pool that shrinks under a step of many waves waits for a row that the step passes through, but
// not for the whole step. Shown once: fails without stays() in CacheState::start_surplus.
void test_a_row_that_goes_takes_nobody_new(const CacheWorld& world,
                                           const std::shared_ptr<Device>& device) {
    FullTiers tiers(world, device);
    constexpr int32_t kFewer = 4;
    constexpr SlotId kEnd{kFewer + ExpertCache::kStagingSlots};
    bool tried = false;
    for (int32_t i = 0; i < 500 && !tried; ++i) {
        tiers.stepper.step(i % 2, ids(i * 7 % 20, 5));  // so that what does not fit comes last
        const Experts experts = ids(i * 7 % 20, 20);
        StepLease lease = tiers.cache.begin_step({.layer = LayerId{i % 2}, .experts = experts});
        std::vector<ReadyExpert> ready;
        while (ready.size() < FullTiers::kSlots + ExpertCache::kStagingSlots) {
            CHECK(lease.wait_ready(ready));
        }
        if (ready[FullTiers::kSlots].slot < kEnd && ready.back().slot < kEnd) continue;
        tried = true;
        std::thread shrinking([&] { tiers.cache.resize(kFewer); });
        while (tiers.cache.slots() != kFewer) std::this_thread::sleep_for(1ms);
        for (const ReadyExpert& one : ready) lease.release(one.position);
        ready.clear();
        while (lease.wait_ready(ready)) {
            for (const ReadyExpert& one : ready) {
                CHECK(one.slot < kEnd);
                lease.release(one.position);
            }
            ready.clear();
        }
        shrinking.join();
    }
    CHECK(tried);
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
    (void)cache->prefetch(LayerId{0}, ids(0, kDeviceExperts));
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

// Ids that were copied and given up are still on their way when more are copied than had room:
// where they go stays until they have come. Shown once: without the wait in StepStream::copy_ids
// the fake driver finds a copy to memory that is no longer registered.
void test_ids_may_be_given_up(const CacheWorld& world, const std::shared_ptr<Device>& device) {
    fake_cuda_reset(1);
    auto cache = std::make_shared<ExpertCache>(world.catalog,
                                               device_options(world, device, 80, 80, false, false));
    const Stream stream = device->create_stream(false);
    {
        const Shared shared(*device);
        StepStream reader(cache, stream);
        std::fill_n(shared.ids(), 4000, 1);
        RoutedStep step{.layer = LayerId{0},
                        .ids = reinterpret_cast<const std::byte*>(shared.ids())};
        step.map = reinterpret_cast<std::byte*>(shared.map());
        step.top_k = 1;
        step.tokens = 1;
        fake_cuda_set_link(FAKE_CUDA_TO_HOST, 0, 5'000'000);
        reader.copy_ids(step);
        step.tokens = 4000;
        reader.copy_ids(step);
        const auto wave = reader.begin();
        CHECK(wave && wave->whole);
        reader.release();
        reader.synchronize();
    }
    device->destroy_stream(stream);
    fake_cuda_reset(1);
}

// Another thread captures a graph while prefetches are under way: the cache's own thread looks
// after them all the same. Shown once: without set_relaxed_capture_mode() it ends the capture.
void test_a_capture_is_left_alone(const CacheWorld& world, const std::shared_ptr<Device>& device) {
    fake_cuda_reset(1);
    ExpertCache cache(world.catalog, device_options(world, device, 80, 80, false, false));
    fake_cuda_set_link(FAKE_CUDA_TO_DEVICE, 5e6, 0);  // 2 ms each
    (void)cache.prefetch(LayerId{0}, ids(0, 20));
    fake_cuda_set_capturing(1);
    const uint64_t before = fake_cuda_calls("cuEventQuery");
    std::this_thread::sleep_for(20ms);
    fake_cuda_set_capturing(0);
    CHECK(fake_cuda_calls("cuEventQuery") > before);
    CHECK_EQ(fake_cuda_captures_ended(), uint64_t{0});
    fake_cuda_reset(1);
}

void test_a_copy_that_never_ends(const CacheWorld& world, const std::shared_ptr<Device>& device) {
    fake_cuda_reset(1);
    auto cache = std::make_shared<ExpertCache>(world.catalog,
                                               device_options(world, device, 4, 80, false, false));
    fake_cuda_hang_next_event();
    (void)cache->prefetch(LayerId{0}, Experts{1, 2});
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
    test_a_demotion_holds_up_nobody(world, device);
    test_a_row_is_not_idle_before_its_copy_out(world, device);
    test_a_demotion_that_fails_loses_nothing(world, device);
    test_a_leased_row_outlives_a_resize(world, device);
    test_a_row_that_goes_takes_nobody_new(world, device);
    test_a_demand_overtakes(world, device);
    test_ids_may_be_given_up(world, device);
    test_a_capture_is_left_alone(world, device);
    test_a_copy_that_never_ends(world, device);
    return test_result();
}
