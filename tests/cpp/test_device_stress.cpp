// A cache on a device under random delays, prefetches and resizes: every byte that a reader's
// stream comes to see is right. For a long run: test_device_stress SEED STEPS.
//
// Shown once, by taking each out in turn: this test finds wrong bytes, or the fake device a copy to
// memory that has gone, without
// - before_read() in StepStream::take_wave (a reader waits for the fill),
// - before_fill() in DeviceLink::copy_demands (a fill waits for the row's past),
// - the readers' points in SlotFences::before_fill,
// - the wait for a copy's point in DeviceLink::unpin_passed (RAM is held for its copy),
// - CopyJob::wait_for_source in copy_demands (a copy in waits for the copy out),
// - the wait for idle slots in Tier::close_frames,
// - read() in DeviceLink::demote (a fill waits for the copy out of its row),
// - `resizing` in Tier (slots are not exchanged then),
// - give_staging_slots_that_stay() in Tier::close_frames, and what it does to closed slots.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "device_world.h"

using namespace moeinf;
using namespace std::chrono_literals;

namespace {

void test_bytes_under_delays(const CacheWorld& world, const std::shared_ptr<Device>& device,
                             uint64_t seed, int64_t steps) {
    const struct {
        int32_t slots, host_slots;
        bool exclusive, gather;
    } forms[] = {{1, 4, false, false},  {3, 80, false, true}, {8, 10, true, false},
                 {20, 64, true, false}, {2, 60, true, true},  {80, 80, false, false}};
    const int64_t each = steps / static_cast<int64_t>(2 * std::size(forms));
    for (const auto& form : forms) {
        fake_cuda_reset(seed);
        fake_cuda_set_granularity(4096);
        fake_cuda_set_max_delay(30'000);
        auto cache = std::make_shared<ExpertCache>(
            world.catalog, device_options(world, device, form.slots, form.host_slots,
                                          form.exclusive, form.gather));
        Counts counts;
        std::atomic<int64_t> asked = 0;
        {
            std::atomic<bool> over = false;
            std::thread disturbance([&, noise = std::mt19937_64(seed + 1)]() mutable {
                while (!over) {
                    const Experts some{static_cast<int32_t>(noise() % kDeviceExperts)};
                    const LayerId layer{static_cast<int32_t>(noise() % kDeviceLayers)};
                    (void)cache->prefetch(layer, some);
                    if (form.slots > 1 && noise() % 4 == 0) {
                        cache->resize(
                            1 + static_cast<int32_t>(noise() % static_cast<uint64_t>(form.slots)));
                    }
                    std::this_thread::sleep_for(200us);
                }
            });
            std::vector<std::thread> threads;
            for (uint64_t t = 0; t < 2; ++t) {
                threads.emplace_back([&, t] {
                    Reader reader(world, cache, device, counts, seed * 7 + t);
                    for (int64_t i = 0; i < each; ++i) asked += reader.step(t == 0 ? 4 : 12);
                });
            }
            for (std::thread& thread : threads) thread.join();
            over = true;
            disturbance.join();
        }
        CHECK_EQ(counts.wrong.load(), 0);
        CHECK_EQ(counts.seen.load(), asked.load());
        std::cout << form.slots << " slots: " << 2 * each << " steps, " << counts.seen
                  << " experts seen, " << counts.wrong << " wrong" << std::endl;
    }
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
    const int64_t steps = argc > 2 ? std::strtoll(argv[2], nullptr, 10) : 2500;
    std::cout << "seed " << seed << ", " << steps << " steps\n";
    const CacheWorld world(kDeviceLayers, kDeviceExperts, seed, CacheWorld::kSmall);
    test_bytes_under_delays(world, open_cuda_device(0), seed, steps);
    return test_result();
}
