// Many threads, a tiny budget, prefetches, resizes and a file that fails again and again. Every
// leased byte must be right until its release, no call may hang, and the statistics must add up.
// Run it under the sanitizers too (see CONTRIBUTING.md).
#include <atomic>
#include <chrono>
#include <set>
#include <thread>

#include "base/error.h"
#include "cache/expert_cache.h"
#include "cache_world.h"
#include "check.h"

using namespace moeinf;
using namespace std::chrono_literals;

namespace {

constexpr int32_t kLayers = 2;
constexpr int32_t kExperts = 10;
constexpr int kThreads = 6;
constexpr int kStepsPerThread = 500;

struct Counts {
    std::atomic<int64_t> wrong_bytes = 0, computed = 0, failed_reads = 0, refused = 0, asked = 0;
    std::atomic<int64_t> unexpected = 0;
};

class Worker {
public:
    Worker(const CacheWorld& world, ExpertCache& cache, Counts& counts, uint64_t seed)
        : world_(world), cache_(cache), counts_(counts), random_(seed) {}

    void run() {
        for (int i = 0; i < kStepsPerThread; ++i) {
            try {
                step();
            } catch (const Error& error) {
                if (error.code() == ErrorCode::kRead) {
                    ++counts_.failed_reads;
                } else if (error.code() == ErrorCode::kCapacity) {
                    ++counts_.refused;
                } else {
                    ++counts_.unexpected;
                }
            }
        }
    }

private:
    size_t below(size_t n) { return random_() % n; }

    Experts some_experts(size_t most) {
        std::set<int32_t> chosen;
        const size_t count = 1 + below(most);
        while (chosen.size() < count) {
            chosen.insert(static_cast<int32_t>(std::min(below(kExperts), below(kExperts))));
        }
        Experts experts(chosen);
        std::shuffle(experts.begin(), experts.end(), random_);
        return experts;
    }

    void check(const ReadyExpert& ready, int32_t layer, const Experts& experts) {
        const ExpertIndex expert = experts[static_cast<size_t>(ready.position)];
        if (!world_.holds(cache_, ready.slot, layer, expert)) ++counts_.wrong_bytes;
        std::this_thread::yield();
        if (!world_.holds(cache_, ready.slot, layer, expert)) ++counts_.wrong_bytes;
        ++counts_.computed;
    }

    void step() {
        const auto layer = static_cast<int32_t>(below(kLayers));
        if (below(3) == 0) (void)cache_.prefetch(LayerId{layer}, some_experts(3));
        const bool at_once = below(2) == 0;
        const Experts experts = some_experts(at_once ? 3 : below(8) == 0 ? kExperts : 4);
        // Long prompts among short steps: frames change hands while experts are computed.
        const bool is_long = !at_once && below(3) == 0;
        const std::vector<int32_t> tokens(experts.size(), 3);
        std::vector<float> recent(experts.size());
        for (float& use : recent) use = static_cast<float>(below(5));
        StepLease lease = cache_.begin_step(
            {.layer = LayerId{layer},
             .experts = experts,
             .counts = tokens,
             .recent = is_long ? std::span<const float>(recent) : std::span<const float>(),
             .prefill = is_long,
             .new_sequence = below(10) == 0,
             .reads_ahead = is_long,
             .all_at_once = at_once});
        counts_.asked += static_cast<int64_t>(experts.size());
        if (below(12) == 0) return;  // given up at once
        std::vector<ReadyExpert> ready;
        if (at_once) {
            lease.acquire_all(ready);
            for (const ReadyExpert& one : ready) check(one, layer, experts);
            return;
        }
        while (lease.wait_ready(ready)) {
            for (const ReadyExpert& one : ready) {
                check(one, layer, experts);
                lease.release(one.position);
            }
            ready.clear();
            if (below(20) == 0) return;  // given up half-way
        }
    }

    const CacheWorld& world_;
    ExpertCache& cache_;
    Counts& counts_;
    std::mt19937_64 random_;
};

void stress(const std::string& policy, const std::string& prefetch, uint64_t seed) {
    const CacheWorld world(kLayers, kExperts, seed);
    ExpertCacheOptions options = world.options(4, policy);
    options.prefetch = prefetch;
    ExpertCache cache(world.catalog, options);
    Counts counts;
    {
        const std::jthread resizing([&](const std::stop_token& stop) {
            std::mt19937_64 random(seed);
            while (!stop.stop_requested()) {
                cache.resize(static_cast<int32_t>(1 + random() % 6));
                (void)cache.stats();
                (void)cache.resident(LayerId{0});
                std::this_thread::sleep_for(2ms);
            }
        });
        const std::jthread breaking([&](const std::stop_token& stop) {
            while (!stop.stop_requested()) {
                world.cut_odd_file();
                std::this_thread::sleep_for(1ms);
                world.heal_odd_file();
                std::this_thread::sleep_for(20ms);
            }
        });
        std::vector<std::jthread> threads;
        for (int i = 0; i < kThreads; ++i) {
            threads.emplace_back([&, i] {
                Worker(world, cache, counts, seed * 31 + static_cast<uint64_t>(i)).run();
            });
        }
        threads.clear();  // joins
    }
    world.heal_odd_file();
    CHECK_EQ(counts.wrong_bytes.load(), int64_t{0});
    CHECK_EQ(counts.unexpected.load(), int64_t{0});
    CHECK(counts.failed_reads > 0);
    CHECK(counts.computed > kThreads * kStepsPerThread / 4);

    // Nothing is held any more: one slot can be had at once, and everything can be read again.
    cache.resize(1);
    for (int32_t layer = 0; layer < kLayers; ++layer) {
        for (int32_t expert = 0; expert < kExperts; ++expert) {
            const Experts experts{expert};
            StepLease lease = cache.begin_step(
                {.layer = LayerId{layer}, .experts = experts, .all_at_once = true});
            std::vector<ReadyExpert> ready;
            lease.acquire_all(ready);
            CHECK(world.holds(cache, ready.at(0).slot, layer, ExpertIndex{expert}));
            ++counts.asked;
        }
    }
    int64_t accesses = 0;
    int64_t resident = 0;
    const auto nbytes = static_cast<int64_t>(world.catalog->expert_bytes());
    for (int32_t layer = 0; layer < kLayers; ++layer) {
        const LayerStats stats = cache.stats()[LayerId{layer}];
        accesses += stats.accesses;
        resident += static_cast<int64_t>(cache.resident(LayerId{layer}).size());
        CHECK_EQ(stats.hits + stats.misses, stats.accesses);
        // The last to be read was demanded, so whatever was prefetched has met its fate.
        CHECK_EQ(stats.prefetch_useful_bytes + stats.prefetch_wasted_bytes, stats.prefetch_bytes);
        CHECK_EQ(stats.demand_bytes % nbytes, int64_t{0});
        CHECK_EQ(stats.prefetch_bytes % nbytes, int64_t{0});
    }
    CHECK_EQ(accesses, counts.asked.load());
    CHECK_EQ(resident, int64_t{1});
    std::cout << policy << ": " << counts.computed << " experts computed, " << counts.failed_reads
              << " failed reads, " << counts.refused << " refused for want of slots\n";
}

}  // namespace

int main() {
    const uint64_t seed = drawn_seed();
    stress("lru", "off", seed);
    stress("decayed_lfu", "previous", seed);
    stress("learned", "transition", seed);
    return test_result();
}
