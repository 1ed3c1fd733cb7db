// A cache on the fake device, and readers of it. Streams run beside the host with random delays. A
// task on a reader's stream checks the bytes at the time when the device reaches it.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <ranges>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "cache/stream_step.h"
#include "cache_world.h"
#include "check.h"
#include "cuda/cuda.h"
#include "device/slot_fences.h"
#include "fake_cuda.h"
#include "tier/device_link.h"

extern "C" {
int cuLaunchHostFunc(void* stream, void (*function)(void*), void* data);
int cuDevicePrimaryCtxRetain(void** context, int device);
int cuCtxPushCurrent_v2(void* context);
}

constexpr int32_t kDeviceLayers = 2;
constexpr int32_t kDeviceExperts = 40;  // of each layer

// Memory that the fake device and the host both see.
struct Shared {
    explicit Shared(moeinf::Device& device) : arena(device.make_arena(1 << 16)) {
        arena->commit(1 << 16);
    }
    [[nodiscard]] int32_t* ids() const { return reinterpret_cast<int32_t*>(arena->data()); }
    [[nodiscard]] int32_t* map() const { return ids() + 4096; }
    std::unique_ptr<moeinf::Arena> arena;
};

struct Counts {
    std::atomic<int64_t> seen = 0, wrong = 0;
};

// Runs on the reader's stream, where a kernel would.
struct Look {
    const CacheWorld& world;
    const moeinf::ExpertCache& cache;
    Counts& counts;
    const int32_t* map;
    int32_t layer;

    static void run(void* data) {
        const std::unique_ptr<Look> look(static_cast<Look*>(data));
        for (int32_t expert = 0; expert < kDeviceExperts; ++expert) {
            const moeinf::SlotId slot{look->map[expert]};
            if (!is_some(slot)) continue;
            ++look->counts.seen;
            if (!look->world.holds(look->cache, slot, look->layer, moeinf::ExpertIndex{expert})) {
                ++look->counts.wrong;
            }
        }
    }
};

class Reader {
public:
    Reader(const CacheWorld& world, std::shared_ptr<moeinf::ExpertCache> cache,
           const std::shared_ptr<moeinf::Device>& device, Counts& counts, uint64_t seed)
        : world_(world),
          cache_(std::move(cache)),
          device_(device),
          counts_(counts),
          random_(seed),
          stream_(device->create_stream(false)),
          shared_(*device),
          reader_(std::make_unique<moeinf::StepStream>(cache_, stream_)) {
        void* context = nullptr;  // for cuLaunchHostFunc on this thread
        CHECK_EQ(cuDevicePrimaryCtxRetain(&context, device->index()), 0);
        CHECK_EQ(cuCtxPushCurrent_v2(context), 0);
    }
    ~Reader() {
        reader_->synchronize();
        reader_.reset();
        device_->destroy_stream(stream_);
    }

    // Returns how many experts the device should come to see.
    int64_t step(size_t most, int32_t the_layer = -1) {
        std::vector<int32_t> all(kDeviceExperts);
        for (int32_t i = 0; i < kDeviceExperts; ++i) all[static_cast<size_t>(i)] = i;
        std::shuffle(all.begin(), all.end(), random_);
        const size_t count = 1 + random_() % most;
        std::copy_n(all.begin(), count, shared_.ids());
        const auto layer =
            the_layer >= 0 ? the_layer : static_cast<int32_t>(random_() % kDeviceLayers);
        moeinf::RoutedStep step;
        step.layer = moeinf::LayerId{layer};
        step.ids = reinterpret_cast<const std::byte*>(shared_.ids());
        step.tokens = 1;
        step.top_k = static_cast<int32_t>(count);
        step.map = reinterpret_cast<std::byte*>(shared_.map());
        reader_->copy_ids(step);
        if (random_() % 8 == 0) reader_->copy_ids(step);  // ids may be given up
        for (auto wave = reader_->begin(); wave; wave = reader_->next()) {
            auto look =
                std::make_unique<Look>(Look{world_, *cache_, counts_, shared_.map(), layer});
            CHECK_EQ(cuLaunchHostFunc(stream_, Look::run, look.release()), 0);
        }
        return static_cast<int64_t>(count);
    }
    moeinf::StepStream& reader() { return *reader_; }

private:
    const CacheWorld& world_;
    const std::shared_ptr<moeinf::ExpertCache> cache_;
    const std::shared_ptr<moeinf::Device> device_;
    Counts& counts_;
    std::mt19937_64 random_;
    const moeinf::Stream stream_;
    const Shared shared_;
    std::unique_ptr<moeinf::StepStream> reader_;
};

inline moeinf::ExpertCacheOptions device_options(const CacheWorld& world,
                                                 const std::shared_ptr<moeinf::Device>& device,
                                                 int32_t slots, int32_t host_slots, bool exclusive,
                                                 bool gather) {
    moeinf::ExpertCacheOptions options = world.options(slots, "lru");
    options.device = device;
    options.host_slots = host_slots;
    options.exclusive = exclusive;
    options.gather_below = gather ? 1 << 20 : 0;
    return options;
}

// Steps of a host that waits for the bytes: no stream reads, so every copy is the cache's own.
struct Stepper {
    const CacheWorld& world;
    moeinf::ExpertCache& cache;
    int64_t wrong = 0;

    void wait_for(moeinf::SlotId slot) {
        moeinf::SlotFences& fences = cache.device_link()->fences();
        while (!fences.arrived(slot)) std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    void step(int32_t layer, std::span<const moeinf::ExpertIndex> experts) {
        moeinf::StepLease lease =
            cache.begin_step({.layer = moeinf::LayerId{layer}, .experts = experts});
        std::vector<moeinf::ReadyExpert> ready;
        while (lease.wait_ready(ready)) {
            for (const moeinf::ReadyExpert& one : ready) {
                wait_for(one.slot);
                const moeinf::ExpertIndex expert = experts[static_cast<size_t>(one.position)];
                wrong += world.holds(cache, one.slot, layer, expert) ? 0 : 1;
                lease.release(one.position);
            }
            ready.clear();
        }
        std::this_thread::sleep_for(
            std::chrono::milliseconds(2));  // until RAM has been told of what has arrived
    }
    moeinf::HostTierStats host() { return cache.device_link()->host().stats(); }
};

inline Experts ids(int32_t first, int32_t count) {
    return Experts(std::views::iota(first, first + count));
}
