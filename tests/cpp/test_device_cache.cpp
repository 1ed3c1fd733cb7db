// A cache on a device, against the fake driver: streams truly run beside the host, with random
// delays, and a task queued on the reader's stream looks at the bytes when the device gets there.
//
// Shown once, by taking each out in turn: this test finds wrong bytes, or the fake device a copy to
// memory that has gone, without
// - before_read() in DeviceReader::next (a reader waits for the fill),
// - before_fill() in DeviceTransport::copy_demands (a fill waits for the row's past),
// - the readers' points in RowFences::before_fill,
// - the wait for a copy's point in DeviceTransport::release_passed (RAM is held for its copy),
// - the wait for `demoted_at_` in copy_demands (a copy in waits for the copy out),
// - before_read() in DeviceTransport::demote (a copy out waits for the fill),
// - the wait for idle rows in ExpertCache::resize.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "base/error.h"
#include "cache/device_reader.h"
#include "cache/device_transport.h"
#include "cache_world.h"
#include "check.h"
#include "cuda/cuda.h"
#include "fake_cuda.h"

using namespace moeinf;
using namespace std::chrono_literals;

extern "C" {
int cuLaunchHostFunc(void* stream, void (*function)(void*), void* data);
int cuDevicePrimaryCtxRetain(void** context, int device);
int cuCtxPushCurrent_v2(void* context);
}

namespace {

constexpr int32_t kLayers = 2;
constexpr int32_t kExperts = 40;

// Memory that the fake device and the host both see.
struct Shared {
    explicit Shared(Device& device) : arena(device.make_arena(1 << 16)) { arena->commit(1 << 16); }
    [[nodiscard]] int32_t* ids() const { return reinterpret_cast<int32_t*>(arena->data()); }
    [[nodiscard]] int32_t* map() const { return ids() + 4096; }
    std::unique_ptr<Arena> arena;
};

struct Counts {
    std::atomic<int64_t> seen = 0, wrong = 0;
};

// Runs on the reader's stream, where a kernel would.
struct Look {
    const CacheWorld& world;
    const ExpertCache& cache;
    Counts& counts;
    const int32_t* map;
    int32_t layer;

    static void run(void* data) {
        const std::unique_ptr<Look> look(static_cast<Look*>(data));
        for (int32_t expert = 0; expert < kExperts; ++expert) {
            const int32_t row = look->map[expert];
            if (row < 0) continue;
            ++look->counts.seen;
            if (!look->world.holds(look->cache, row, look->layer, expert)) ++look->counts.wrong;
        }
    }
};

class Reader {
public:
    Reader(const CacheWorld& world, std::shared_ptr<ExpertCache> cache,
           const std::shared_ptr<Device>& device, Counts& counts, uint64_t seed)
        : world_(world),
          cache_(std::move(cache)),
          device_(device),
          counts_(counts),
          random_(seed),
          stream_(device->create_stream(false)),
          shared_(*device),
          reader_(std::make_unique<DeviceReader>(cache_, stream_)) {
        void* context = nullptr;  // for cuLaunchHostFunc on this thread
        CHECK_EQ(cuDevicePrimaryCtxRetain(&context, 0), 0);
        CHECK_EQ(cuCtxPushCurrent_v2(context), 0);
    }
    ~Reader() {
        reader_->synchronize();
        reader_.reset();
        device_->destroy_stream(stream_);
    }

    // Returns how many experts the device should come to see.
    int64_t step(size_t most, int32_t the_layer = -1) {
        std::vector<int32_t> all(kExperts);
        for (int32_t i = 0; i < kExperts; ++i) all[static_cast<size_t>(i)] = i;
        std::shuffle(all.begin(), all.end(), random_);
        const size_t count = 1 + random_() % most;
        std::copy_n(all.begin(), count, shared_.ids());
        const auto layer = the_layer >= 0 ? the_layer : static_cast<int32_t>(random_() % kLayers);
        DeviceStep step;
        step.layer = layer;
        step.ids = reinterpret_cast<const std::byte*>(shared_.ids());
        step.tokens = 1;
        step.top_k = static_cast<int32_t>(count);
        step.map = reinterpret_cast<std::byte*>(shared_.map());
        reader_->begin(step);
        while (reader_->next()) {
            auto look =
                std::make_unique<Look>(Look{world_, *cache_, counts_, shared_.map(), layer});
            CHECK_EQ(cuLaunchHostFunc(stream_, Look::run, look.release()), 0);
            reader_->done();
        }
        return static_cast<int64_t>(count);
    }
    DeviceReader& reader() { return *reader_; }

private:
    const CacheWorld& world_;
    const std::shared_ptr<ExpertCache> cache_;
    const std::shared_ptr<Device> device_;
    Counts& counts_;
    std::mt19937_64 random_;
    const Stream stream_;
    const Shared shared_;
    std::unique_ptr<DeviceReader> reader_;
};

ExpertCacheOptions options(const CacheWorld& world, const std::shared_ptr<Device>& device,
                           int32_t slots, int32_t host_slots, bool exclusive, bool gather) {
    ExpertCacheOptions options = world.options(slots, "lru");
    options.device = device;
    options.host_slots = host_slots;
    options.exclusive = exclusive;
    options.gather_below = gather ? 1 << 20 : 0;
    return options;
}

void test_bytes_under_delays(const CacheWorld& world, const std::shared_ptr<Device>& device,
                             uint64_t seed, int64_t steps) {
    std::mt19937_64 random(seed);
    const struct {
        int32_t slots, host_slots;
        bool exclusive, gather;
    } forms[] = {{1, 4, false, false},
                 {3, 80, false, true},
                 {8, 10, true, false},
                 {2, 60, true, true},
                 {80, 80, false, false}};
    for (const auto& form : forms) {
        fake_cuda_reset(seed);
        fake_cuda_set_granularity(4096);
        fake_cuda_set_max_delay(30'000);
        auto cache = std::make_shared<ExpertCache>(
            world.catalog,
            options(world, device, form.slots, form.host_slots, form.exclusive, form.gather));
        Counts counts;
        std::atomic<int64_t> asked = 0;
        {
            std::atomic<bool> over = false;
            std::thread disturbance([&, noise = std::mt19937_64(seed + 1)]() mutable {
                while (!over) {
                    std::vector<int32_t> some{static_cast<int32_t>(noise() % kExperts)};
                    (void)cache->prefetch(static_cast<int32_t>(noise() % kLayers), some);
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
                    for (int64_t i = 0; i < steps; ++i) asked += reader.step(t == 0 ? 4 : 30);
                });
            }
            for (std::thread& thread : threads) thread.join();
            over = true;
            disturbance.join();
        }
        CHECK_EQ(counts.wrong.load(), 0);
        CHECK_EQ(counts.seen.load(), asked.load());
    }
}

void test_a_failed_copy_fails_one_step(const CacheWorld& world,
                                       const std::shared_ptr<Device>& device) {
    fake_cuda_reset(1);
    Counts counts;
    auto cache =
        std::make_shared<ExpertCache>(world.catalog, options(world, device, 4, 80, false, false));
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
    auto cache =
        std::make_shared<ExpertCache>(world.catalog, options(world, device, 4, 80, false, false));
    const HostTierStats stats = cache->device_transport()->host().stats();
    CHECK(stats.slots >= HostTier::kLeastSlots && stats.slots <= 40);
    CHECK_EQ(stats.slots + stats.slots_refused, 80);
    fake_cuda_reset(1);
}

void test_resize_without_memory_keeps_the_size(const CacheWorld& world,
                                               const std::shared_ptr<Device>& device) {
    fake_cuda_reset(1);
    fake_cuda_set_granularity(4096);
    auto cache =
        std::make_shared<ExpertCache>(world.catalog, options(world, device, 4, 80, false, false));
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
    auto cache =
        std::make_shared<ExpertCache>(world.catalog, options(world, device, 40, 60, true, false));
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

// A queue full of prefetches on a slow link: of what was not yet on its way when the demand was
// enqueued, nothing goes first.
void test_a_demand_overtakes(const CacheWorld& world, const std::shared_ptr<Device>& device) {
    fake_cuda_reset(1);
    auto cache =
        std::make_shared<ExpertCache>(world.catalog, options(world, device, 80, 80, false, false));
    Counts counts;
    Reader reader(world, cache, device, counts, 3);
    fake_cuda_set_link(FAKE_CUDA_TO_DEVICE, 5e6, 0);  // 2 ms each
    std::vector<int32_t> others;
    for (int32_t i = 0; i < kExperts; ++i) others.push_back(i);
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
    auto cache =
        std::make_shared<ExpertCache>(world.catalog, options(world, device, 4, 80, false, false));
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
    const int64_t steps = argc > 2 ? std::strtoll(argv[2], nullptr, 10) : 250;
    std::cout << "seed " << seed << ", " << steps << " steps each\n";
    const auto device = open_cuda_device(0);
    const CacheWorld world(kLayers, kExperts, seed);
    test_bytes_under_delays(world, device, seed, steps);
    test_a_failed_copy_fails_one_step(world, device);
    test_pinned_memory_refused(world, device);
    test_resize_without_memory_keeps_the_size(world, device);
    test_exclusive_tiers_add_up(world, device);
    test_a_demand_overtakes(world, device);
    test_a_copy_that_never_ends(world, device);
    return test_result();
}
