// Several devices and caches on one RAM tier: an expert is read and pinned once for all of them,
// and neither a cache nor a device that goes takes anything from the others. For a long run:
// test_two_devices SEED STEPS.
//
// Shown once, by removing each: this test fails without
// - the fill that HostTier::accept_demotion starts (another device copies bytes that are to come),
// - CopyJob::wait_for_source (a device copies out of RAM before the other has copied there),
// - the holders in HostTier::accept_demotion (RAM keeps what a device has),
// - the holders that ~DeviceLink removes (RAM refuses what nobody has),
// - `arrived` in HostTier::end_demotion (bytes are used that a broken device never copied);
// and it hangs without
// - give_back_pins() in ~DeviceLink (RAM is full for ever),
// - HostTier::withdraw in ~DeviceLink, on most seeds (the last waiter starves).
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <optional>
#include <thread>

#include "base/error.h"
#include "device_world.h"
#include "tier/device_link.h"
#include "watched_device.h"

using namespace moeinf;
using namespace std::chrono_literals;

namespace {

constexpr int kLaunchFailed = 719;  // CUDA_ERROR_LAUNCH_FAILED

struct Devices {
    Devices() {
        fake_cuda_set_device_count(2);
        for (int32_t index = 0; index < 2; ++index) all.push_back(open_cuda_device(index));
    }
    const std::shared_ptr<Device>& operator[](size_t index) const { return all[index]; }
    std::vector<std::shared_ptr<Device>> all;
};

void reset(uint64_t seed = 1) {
    fake_cuda_reset(seed);
    fake_cuda_set_device_count(2);
    fake_cuda_set_granularity(4096);
}

std::shared_ptr<HostTier> make_tier(const CacheWorld& world, const Devices& devices, int32_t slots,
                                    bool exclusive) {
    HostTierOptions options;
    options.slots = slots;
    options.policy = "lru";
    options.exclusive = exclusive;
    return HostTier::make(world.catalog, *devices[0], std::move(options));
}

std::shared_ptr<ExpertCache> make_cache(const CacheWorld& world,
                                        const std::shared_ptr<Device>& device,
                                        std::shared_ptr<HostTier> tier, int32_t slots,
                                        bool gather = false) {
    ExpertCacheOptions options = device_options(world, device, slots, 0, false, gather);
    options.host_tier = std::move(tier);
    return std::make_shared<ExpertCache>(world.catalog, std::move(options));
}

template <class Action>
std::string error_of(const Action& action) {
    try {
        action();
    } catch (const Error& error) {
        return error.what();
    }
    return {};
}

bool mentions(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
}

// Both ask for all experts of both layers at the same time.
void test_one_read_for_two_devices(const CacheWorld& world, const Devices& devices) {
    reset();
    auto tier = make_tier(world, devices, 80, false);
    std::vector<std::shared_ptr<ExpertCache>> caches;
    for (const auto& device : devices.all) caches.push_back(make_cache(world, device, tier, 80));
    std::atomic<int64_t> wrong = 0;
    {
        std::vector<std::jthread> threads;
        for (const auto& cache : caches) {
            threads.emplace_back([&world, &wrong, cache] {
                Stepper stepper{world, *cache};
                for (int32_t layer = 0; layer < kDeviceLayers; ++layer) {
                    stepper.step(layer, ids(0, kDeviceExperts));
                }
                wrong += stepper.wrong;
            });
        }
    }
    const int64_t experts = kDeviceLayers * kDeviceExperts;
    const auto nbytes = static_cast<int64_t>(world.catalog->expert_bytes());
    CHECK_EQ(wrong.load(), 0);
    CHECK_EQ(tier->stats().read_bytes, experts * nbytes);
    CHECK_EQ(tier->stats().hits + tier->stats().misses, 2 * experts);
    CHECK(fake_cuda_device_bytes(0, FAKE_CUDA_TO_DEVICE) > 0);
    CHECK_EQ(fake_cuda_device_bytes(0, FAKE_CUDA_TO_DEVICE),
             fake_cuda_device_bytes(1, FAKE_CUDA_TO_DEVICE));
}

void test_other_stores_are_refused(const CacheWorld& world, const Devices& devices) {
    reset();
    const CacheWorld other(kDeviceLayers, kDeviceExperts, 77);
    auto tier = make_tier(world, devices, 8, false);
    const std::string words = error_of([&] { (void)make_cache(other, devices[1], tier, 4); });
    CHECK(mentions(words, "different stores"));
    CHECK(mentions(words, world.paths[0]));
    CHECK(mentions(words, other.paths[0]));
    // A store that was opened twice is the same one.
    const Catalog again = *world.catalog;
    ExpertCacheOptions options = device_options(world, devices[1], 4, 0, false, false);
    options.host_tier = tier;
    ExpertCache cache(std::make_shared<const Catalog>(again), options);
    options.device = nullptr;
    CHECK(mentions(error_of([&] { ExpertCache(world.catalog, options); }), "on a device"));
    CHECK(mentions(error_of([&] { (void)HostTier::make(nullptr, *devices[0], {}); }), "catalog"));
}

// The tier's owner lets go of it first; then a cache closes in the middle of the other's steps,
// with reads under way that both wait for.
void test_any_order_of_destruction(const CacheWorld& world, const Devices& devices, uint64_t seed) {
    for (int round = 0; round < 6; ++round) {
        reset(seed + static_cast<uint64_t>(round));
        fake_cuda_set_max_delay(30'000);
        auto tier = make_tier(world, devices, 6, round % 2 == 1);
        const std::weak_ptr<HostTier> watched = tier;
        auto first = make_cache(world, devices[0], tier, 5);
        auto second = make_cache(world, devices[1], tier, 5);
        if (round < 3) tier.reset();
        Counts counts;
        int64_t expected = 0;
        {
            Reader reader(world, first, devices[0], counts, seed);
            for (int i = 0; i < 8; ++i) expected += reader.step(6);
            std::thread closing([&] {
                (void)second->prefetch(LayerId{0}, ids(0, 5));
                StepLease lease = second->begin_step({.layer = LayerId{1}, .experts = ids(0, 9)});
                lease.release();
                second.reset();
            });
            for (int i = 0; i < 24; ++i) expected += reader.step(6);
            closing.join();
            // All of the RAM's slots serve the one that is left.
            for (int i = 0; i < 24; ++i) expected += reader.step(12);
        }
        CHECK_EQ(counts.seen.load(), expected);
        CHECK_EQ(counts.wrong.load(), 0);
        first.reset();
        tier.reset();
        CHECK(watched.expired());
    }
    CHECK_EQ(fake_cuda_registered_bytes(), uint64_t{0});
    CHECK_EQ(fake_cuda_used_bytes(), uint64_t{0});
}

// What a device evicts comes to RAM unless another device still holds it. RAM is exclusive: what a
// device holds leaves it first.
void test_the_last_holder_demotes(const CacheWorld& world, const Devices& devices) {
    reset();
    const auto nbytes = static_cast<int64_t>(world.catalog->expert_bytes());
    auto tier = make_tier(world, devices, 12, true);
    auto first = make_cache(world, devices[0], tier, 8);
    auto second = make_cache(world, devices[1], tier, 4);
    Stepper one{world, *first}, two{world, *second};
    one.step(0, ids(0, 4));
    two.step(0, ids(0, 4));
    for (int32_t i = 0; i < 40; i += 4) {  // until RAM has given away its copies of the four
        one.step(1, ids(i, 4));
        one.step(0, ids(0, 4));
    }
    for (int32_t i = 0; i < 8; i += 4) one.step(1, ids(i, 4));  // drives them out
    tier->reset_stats();
    one.step(0, ids(0, 4));
    CHECK_EQ(tier->stats().read_bytes, 4 * nbytes);  // out of the files: the other held them

    for (int32_t i = 0; i < 40; i += 4) {
        one.step(1, ids(i, 4));
        one.step(0, ids(0, 4));
    }
    second.reset();  // holds nothing any more
    for (int32_t i = 0; i < 8; i += 4) one.step(1, ids(i, 4));
    tier->reset_stats();
    one.step(0, ids(0, 4));
    CHECK_EQ(tier->stats().read_bytes, int64_t{0});
    CHECK_EQ(one.wrong + two.wrong, int64_t{0});
}

// RAM of twelve slots, of which a step of the first device on experts 20 to 23 of layer 1 fills
// some with 12 to 15, which it drives out.
struct Demoting {
    Demoting(const CacheWorld& world, const Devices& devices, std::shared_ptr<Device> first_device)
        : tier(make_tier(world, devices, 12, true)),
          first(make_cache(world, first_device, tier, 4)),
          second(make_cache(world, devices[1], tier, 8)),
          one{world, *first},
          two{world, *second} {
        for (int32_t i = 0; i < 40; i += 4) one.step(0, ids(i, 4));
        for (int32_t i = 0; i < 16; i += 4) one.step(1, ids(i, 4));
        tier->reset_stats();
    }
    std::shared_ptr<HostTier> tier;
    std::shared_ptr<ExpertCache> first, second;
    Stepper one, two;
};

// The link to RAM is slow: the other device's copy starts when the bytes have come.
void test_a_demotion_is_waited_for(const CacheWorld& world, const Devices& devices) {
    reset();
    Demoting tiers(world, devices, devices[0]);
    fake_cuda_set_link(FAKE_CUDA_TO_HOST, 1.25e6, 0);  // 9 ms each
    tiers.one.step(1, ids(20, 4));
    tiers.two.step(1, ids(12, 4));
    CHECK(tiers.tier->stats().demoted > 0);
    CHECK(tiers.tier->stats().hits > 0);
    CHECK_EQ(tiers.one.wrong + tiers.two.wrong, int64_t{0});
}

// The other device asks after RAM has made room, and before the copy has been enqueued.
void test_a_demotion_that_begins_is_waited_for(const CacheWorld& world, const Devices& devices) {
    struct Watch final : DeviceWatcher {
        void call_begins() override {
            if (tiers == nullptr || std::this_thread::get_id() != thread || over ||
                tiers->tier->stats().demoted == 0) {
                return;
            }
            over = true;
            std::jthread([this] {
                lease.emplace(tiers->second->begin_step({.layer = LayerId{1}, .experts = experts}));
            });
        }
        void call_ends() override {}
        const Experts experts = ids(12, 4);
        const std::thread::id thread = std::this_thread::get_id();
        Demoting* tiers = nullptr;
        bool over = false;
        std::optional<StepLease> lease;
    } watch;
    reset();
    Demoting tiers(world, devices, std::make_shared<WatchedDevice>(devices[0], watch));
    fake_cuda_set_link(FAKE_CUDA_TO_HOST, 1.25e6, 0);
    watch.tiers = &tiers;
    tiers.one.step(1, ids(20, 4));
    CHECK(watch.over);
    if (!watch.over) return;
    std::vector<ReadyExpert> ready;
    while (watch.lease->wait_ready(ready)) {
    }
    for (const ReadyExpert& one : ready) {
        tiers.two.wait_for(one.slot);
        const ExpertIndex expert = watch.experts[static_cast<size_t>(one.position)];
        CHECK(world.holds(*tiers.second, one.slot, 1, expert));
    }
    watch.lease.reset();
    watch.tiers = nullptr;
    CHECK_EQ(tiers.one.wrong, int64_t{0});
}

// One device breaks with copies under way in both directions. The other goes on, also with the
// slots of RAM that the broken one had pinned, once its cache has closed. What had not come to RAM
// is read from the files.
void test_a_broken_device_breaks_no_other(const CacheWorld& world, const Devices& devices) {
    reset();
    Demoting tiers(world, devices, devices[0]);
    fake_cuda_set_link(FAKE_CUDA_TO_DEVICE, 5e5, 0);
    fake_cuda_set_link(FAKE_CUDA_TO_HOST, 5e4, 0);  // 200 ms each
    {
        StepLease lease = tiers.first->begin_step({.layer = LayerId{1}, .experts = ids(20, 4)});
        std::vector<ReadyExpert> ready;
        while (ready.size() < 4 && lease.wait_ready(ready)) {
        }
        fake_cuda_break_device(0, kLaunchFailed);
    }
    CHECK(tiers.tier->stats().demoted > 0);
    fake_cuda_set_link(FAKE_CUDA_TO_DEVICE, 0, 0);
    fake_cuda_set_link(FAKE_CUDA_TO_HOST, 0, 0);
    CHECK(mentions(error_of([&] { tiers.one.step(0, ids(36, 4)); }), "719"));
    tiers.two.step(0, ids(0, 2));
    tiers.first.reset();
    tiers.two.step(1, ids(12, 4));
    for (int32_t layer = 0; layer < kDeviceLayers; ++layer) tiers.two.step(layer, ids(0, 40));
    CHECK_EQ(tiers.two.wrong, int64_t{0});
    tiers.second.reset();
    std::this_thread::sleep_for(1s);  // until the fake device has ended its copies
    reset();
}

// Readers on both devices, prefetches and resizes on both, and too little RAM for either.
void test_bytes_under_delays(const CacheWorld& world, const Devices& devices, uint64_t seed,
                             int64_t steps) {
    const struct {
        int32_t slots, host_slots;
        bool exclusive, gather;
    } forms[] = {{2, 4, false, false},
                 {6, 10, true, false},
                 {10, 80, false, true},
                 {20, 44, true, true},
                 {1, 5, true, false}};
    const int64_t each = steps / static_cast<int64_t>(4 * std::size(forms));
    for (const auto& form : forms) {
        reset(seed);
        fake_cuda_set_max_delay(30'000);
        auto tier = make_tier(world, devices, form.host_slots, form.exclusive);
        std::vector<std::shared_ptr<ExpertCache>> caches;
        for (const auto& device : devices.all) {
            caches.push_back(make_cache(world, device, tier, form.slots, form.gather));
        }
        tier.reset();
        Counts counts;
        std::atomic<int64_t> expected = 0;
        {
            std::atomic<bool> over = false;
            std::jthread disturbance([&, noise = std::mt19937_64(seed + 1)]() mutable {
                while (!over) {
                    const auto& cache = caches[noise() % 2];
                    const ExpertIndex some[] = {
                        ExpertIndex{static_cast<int32_t>(noise() % kDeviceExperts)}};
                    (void)cache->prefetch(LayerId{static_cast<int32_t>(noise() % kDeviceLayers)},
                                          some);
                    if (form.slots > 1 && noise() % 4 == 0) {
                        cache->resize(
                            1 + static_cast<int32_t>(noise() % static_cast<uint64_t>(form.slots)));
                    }
                    std::this_thread::sleep_for(200us);
                }
            });
            std::vector<std::thread> threads;
            for (size_t t = 0; t < 4; ++t) {
                threads.emplace_back([&, t] {
                    Reader reader(world, caches[t % 2], devices[t % 2], counts, seed * 7 + t);
                    for (int64_t i = 0; i < each; ++i) expected += reader.step(t < 2 ? 4 : 12);
                });
            }
            for (std::thread& thread : threads) thread.join();
            over = true;
        }
        CHECK_EQ(counts.wrong.load(), 0);
        CHECK_EQ(counts.seen.load(), expected.load());
        std::cout << "2 x " << form.slots << " slots over " << form.host_slots << ": "
                  << counts.seen << " experts seen, " << counts.wrong << " wrong" << std::endl;
    }
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
    const int64_t steps = argc > 2 ? std::strtoll(argv[2], nullptr, 10) : 2000;
    std::cout << "seed " << seed << ", " << steps << " steps\n";
    reset(seed);
    const Devices devices;
    const CacheWorld world(kDeviceLayers, kDeviceExperts, seed);
    test_one_read_for_two_devices(world, devices);
    test_other_stores_are_refused(world, devices);
    test_any_order_of_destruction(world, devices, seed);
    test_the_last_holder_demotes(world, devices);
    test_a_demotion_is_waited_for(world, devices);
    test_a_demotion_that_begins_is_waited_for(world, devices);
    test_a_broken_device_breaks_no_other(world, devices);
    const CacheWorld small(kDeviceLayers, kDeviceExperts, seed, CacheWorld::kSmall);
    test_bytes_under_delays(small, devices, seed, steps);
    return test_result();
}
