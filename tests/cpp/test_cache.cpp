// The live cache: what is resident, what a lease promises, and what a fault leaves behind.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <latch>
#include <optional>
#include <set>
#include <thread>

#include "base/error.h"
#include "cache/expert_cache.h"
#include "cache_world.h"
#include "check.h"
#include "residency_model.h"

using namespace moeinf;

namespace {

using Ids = Experts;
using namespace std::chrono_literals;

// Code and message of what `action` throws; kUnsupported and "" if nothing.
template <class Action>
std::pair<ErrorCode, std::string> thrown_by(const Action& action) {
    try {
        action();
    } catch (const Error& error) {
        return {error.code(), error.what()};
    }
    return {ErrorCode::kUnsupported, ""};
}

template <class Action>
void check_throws(ErrorCode code, const std::string& mention, const Action& action) {
    const auto [found, message] = thrown_by(action);
    if (message.find(mention) == std::string::npos || message.empty() || found != code) {
        ++failed_checks;
        std::cerr << "expected an error that mentions '" << mention << "', found '" << message
                  << "'\n";
    }
}

LayerStats total(const ExpertCache& cache) {
    LayerStats sum;
    for (const LayerStats& layer : cache.stats()) {
        sum.accesses += layer.accesses;
        sum.hits += layer.hits;
        sum.misses += layer.misses;
        sum.evictions += layer.evictions;
        sum.demand_bytes += layer.demand_bytes;
        sum.prefetch_bytes += layer.prefetch_bytes;
        sum.prefetch_useful_bytes += layer.prefetch_useful_bytes;
        sum.prefetch_wasted_bytes += layer.prefetch_wasted_bytes;
        sum.stall_seconds += layer.stall_seconds;
    }
    return sum;
}

// Runs a whole step in waves, checks every byte, and that each expert comes exactly once.
void run_step(const CacheWorld& world, ExpertCache& cache, int32_t layer, const Ids& experts,
              bool new_sequence = false) {
    StepLease lease = cache.begin_step(
        {.layer = LayerId{layer}, .experts = experts, .new_sequence = new_sequence});
    std::vector<ReadyExpert> ready;
    std::set<int32_t> seen;
    while (lease.wait_ready(ready)) {
        for (const ReadyExpert& one : ready) {
            CHECK(seen.insert(one.position).second);
            CHECK(world.holds(cache, one.slot, layer, experts[static_cast<size_t>(one.position)]));
            lease.release(one.position);
        }
        ready.clear();
    }
    CHECK_EQ(seen.size(), experts.size());
}

IdList<SlotId> acquire(const CacheWorld& world, ExpertCache& cache, int32_t layer,
                       const Ids& experts, std::optional<StepLease>& lease) {
    lease.emplace(
        cache.begin_step({.layer = LayerId{layer}, .experts = experts, .all_at_once = true}));
    std::vector<ReadyExpert> ready;
    lease->acquire_all(ready);
    CHECK_EQ(ready.size(), experts.size());
    IdList<SlotId> slots;
    for (size_t i = 0; i < ready.size(); ++i) {
        CHECK_EQ(static_cast<size_t>(ready[i].position), i);
        CHECK(world.holds(cache, ready[i].slot, layer, experts[i]));
        slots.push_back(ready[i].slot);
    }
    return slots;
}

void check_matches_the_model(const std::string& policy, int32_t slots, uint64_t seed) {
    const CacheWorld world(3, 6, seed);
    ExpertCache cache = world.cache(slots, policy);
    ResidencyModel model{policy, 3, 6, static_cast<size_t>(slots), -1, -1, 0, {}, {}, {}};
    std::mt19937_64 random(seed);
    int64_t hits = 0;
    int64_t accesses = 0;
    for (int token = 0; token < 12; ++token) {
        for (int32_t layer = 0; layer < 3; ++layer) {
            std::set<int32_t> chosen;
            const size_t k = token % 5 == 0 ? 6 : 1 + random() % 3;
            while (chosen.size() < k) chosen.insert(static_cast<int32_t>(random() % 6));
            Ids experts(chosen);
            std::shuffle(experts.begin(), experts.end(), random);
            const bool new_sequence = layer == 0 && token % 5 == 0;
            run_step(world, cache, layer, experts, new_sequence);
            std::vector<int> flat;
            for (ExpertIndex e : experts) flat.push_back(layer * 6 + number(e));
            hits += model.take(layer, flat, new_sequence, {}).first;
            accesses += static_cast<int64_t>(flat.size());
            CHECK_EQ(total(cache).hits, hits);
            CHECK_EQ(total(cache).accesses, accesses);
            std::set<int32_t> resident;
            for (int32_t l = 0; l < 3; ++l) {
                for (ExpertIndex e : cache.resident(LayerId{l})) {
                    resident.insert(l * 6 + number(e));
                }
            }
            CHECK(resident == model.resident);
        }
    }
    const LayerStats sum = total(cache);
    CHECK_EQ(sum.misses, accesses - hits);
    CHECK_EQ(sum.demand_bytes, sum.misses * static_cast<int64_t>(world.catalog->expert_bytes()));
    cache.reset_stats();
    CHECK_EQ(total(cache).accesses, int64_t{0});
}

void check_leases_survive_pressure(uint64_t seed) {
    const CacheWorld world(2, 8, seed);
    ExpertCache cache = world.cache(3, "lru");
    std::optional<StepLease> held;
    const IdList<SlotId> slots = acquire(world, cache, 1, {4, 7}, held);
    for (int round = 0; round < 20; ++round) {
        run_step(world, cache, round % 2, {0, 1, 2, 3, 5});
        (void)cache.prefetch(LayerId{0}, Ids{6, 7});
        CHECK(world.holds(cache, slots[0], 1, ExpertIndex{4}));
        CHECK(world.holds(cache, slots[1], 1, ExpertIndex{7}));
    }
    held->release();
    check_throws(ErrorCode::kInvalid, "released", [&] { held->release(0); });
    std::vector<ReadyExpert> ready;
    check_throws(ErrorCode::kInvalid, "released", [&] { (void)held->wait_ready(ready); });
    check_throws(ErrorCode::kInvalid, "released", [&] { held->acquire_all(ready); });
}

void check_capacity(uint64_t seed) {
    const CacheWorld world(1, 8, seed);
    ExpertCache cache = world.cache(2, "lru");
    std::optional<StepLease> held;
    std::optional<StepLease> more;
    check_throws(ErrorCode::kCapacity, "3 experts", [&] {
        (void)cache.begin_step({.layer = LayerId{0}, .experts = Ids{1, 2, 3}, .all_at_once = true});
    });
    CHECK_EQ(total(cache).accesses, int64_t{0});
    (void)acquire(world, cache, 0, {0, 1}, held);
    check_throws(ErrorCode::kCapacity, "other leases hold 2",
                 [&] { (void)acquire(world, cache, 0, {2}, more); });
    (void)acquire(world, cache, 0, {1, 0}, more);  // what the thread holds already it may share
    run_step(world, cache, 0, {5, 6, 7});          // through staging
    // Two staging slots are handed out and neither is released: no expert can come any more.
    StepLease greedy = cache.begin_step({.layer = LayerId{0}, .experts = Ids{3, 4, 5}});
    std::vector<ReadyExpert> ready;
    while (ready.size() < 2) CHECK(greedy.wait_ready(ready));
    check_throws(ErrorCode::kCapacity, "staging", [&] { (void)greedy.wait_ready(ready); });
    greedy.release(ready[0].position);
    CHECK(greedy.wait_ready(ready));
    CHECK(!greedy.wait_ready(ready));
    check_throws(ErrorCode::kCapacity, "own leases", [&] { cache.resize(1); });
    CHECK_EQ(cache.slots(), 2);
}

// Each of two threads holds a staging slot and wants another: one of them gets an error, none
// hangs.
void check_two_threads_in_staging_slots(uint64_t seed) {
    const CacheWorld world(1, 8, seed);
    ExpertCache cache = world.cache(1, "lru");
    std::optional<StepLease> held;
    (void)acquire(world, cache, 0, {0}, held);
    std::latch both(2);
    std::atomic<int> refused = 0;
    const auto greedy = [&](const Ids& experts) {
        StepLease lease = cache.begin_step({.layer = LayerId{0}, .experts = Ids{experts[0]}});
        std::vector<ReadyExpert> ready;
        (void)lease.wait_ready(ready);
        both.arrive_and_wait();
        StepLease second = cache.begin_step({.layer = LayerId{0}, .experts = Ids{experts[1]}});
        const auto [code, message] = thrown_by([&] { (void)second.wait_ready(ready); });
        if (!message.empty() && code == ErrorCode::kCapacity) ++refused;
    };
    {
        std::jthread one(greedy, Ids{1, 2});
        std::jthread two(greedy, Ids{3, 4});
    }
    CHECK_EQ(refused.load(), 1);
}

void check_bad_requests(uint64_t seed) {
    const CacheWorld world(2, 4, seed);
    ExpertCache cache = world.cache(2, "lfu");
    check_throws(ErrorCode::kInvalid, "0..1, found 2",
                 [&] { (void)cache.begin_step({.layer = LayerId{2}, .experts = Ids{0}}); });
    check_throws(ErrorCode::kInvalid, "found -1",
                 [&] { (void)cache.begin_step({.layer = LayerId{-1}, .experts = Ids{0}}); });
    check_throws(ErrorCode::kInvalid, "found 4",
                 [&] { (void)cache.begin_step({.layer = LayerId{0}, .experts = Ids{0, 4}}); });
    check_throws(ErrorCode::kInvalid, "expert 3 of layer 1 is named twice",
                 [&] { (void)cache.begin_step({.layer = LayerId{1}, .experts = Ids{3, 0, 3}}); });
    check_throws(ErrorCode::kInvalid, "expected 2 counts, found 1", [&] {
        (void)cache.begin_step(
            {.layer = LayerId{1}, .experts = Ids{3, 0}, .counts = std::vector<int32_t>{1}});
    });
    check_throws(ErrorCode::kInvalid, "found -7",
                 [&] { (void)cache.prefetch(LayerId{0}, Ids{-7}); });
    check_throws(ErrorCode::kInvalid, "found 9", [&] { (void)cache.resident(LayerId{9}); });
    check_throws(ErrorCode::kInvalid, "not 0", [&] { cache.resize(0); });
    check_throws(ErrorCode::kInvalid, "not 9", [&] { cache.resize(9); });
    check_throws(ErrorCode::kInvalid, "not 9", [&] { (void)world.cache(9, "lru"); });
    check_throws(ErrorCode::kInvalid, "decayed_lfu", [&] { (void)world.cache(1, "nope"); });
    CHECK_EQ(total(cache).accesses, int64_t{0});
    run_step(world, cache, 1, {});
    StepLease lease = cache.begin_step({.layer = LayerId{0}, .experts = Ids{1}});
    check_throws(ErrorCode::kInvalid, "not handed out", [&] { lease.release(0); });
    check_throws(ErrorCode::kInvalid, "position 1", [&] { lease.release(1); });
}

void check_failed_reads(uint64_t seed) {
    const CacheWorld world(1, 12, seed);
    ExpertCache cache = world.cache(3, "lru");
    run_step(world, cache, 0, {1});  // odd experts lie in the file that will be cut
    world.cut_odd_file();
    run_step(world, cache, 0, {1, 2});
    for (const bool at_once : {false, true}) {
        StepLease lease =
            cache.begin_step({.layer = LayerId{0}, .experts = Ids{4, 3}, .all_at_once = at_once});
        std::vector<ReadyExpert> ready;
        const auto wait = [&] {
            if (at_once) {
                lease.acquire_all(ready);
            } else {
                while (lease.wait_ready(ready)) continue;
            }
        };
        check_throws(ErrorCode::kRead, "file-1", wait);
        check_throws(ErrorCode::kRead, "file-1", wait);
    }
    // Also in a staging slot; and a step that fails there releases its staging slots.
    for (int round = 0; round < 4; ++round) {
        check_throws(ErrorCode::kRead, "file-1",
                     [&] { run_step(world, cache, 0, {0, 2, 4, 5, 7, 9, 11}); });
    }
    (void)cache.prefetch(LayerId{0}, Ids{3, 5});
    run_step(world, cache, 0, {0, 2, 4, 6, 8});
    for (const int32_t expert : {3, 5}) {  // which also outwaits the prefetches
        check_throws(ErrorCode::kRead, "file-1", [&] { run_step(world, cache, 0, {expert}); });
    }
    for (const ExpertIndex e : cache.resident(LayerId{0})) CHECK(number(e) % 2 == 0);
    world.heal_odd_file();
    run_step(world, cache, 0, {3, 5, 7, 9, 11});
    run_step(world, cache, 0, {0, 1, 2, 3, 4, 5});
    CHECK_EQ(cache.resident(LayerId{0}).size(), size_t{3});
}

// Several steps wait for one read: it happens once, and if it fails each is told.
void check_one_read_for_all(uint64_t seed) {
    const CacheWorld world(1, 16, seed);
    for (const bool fails : {false, true}) {
        ExpertCache cache = world.cache(16, "lru");
        if (fails) world.cut_odd_file();
        std::atomic<int> told = 0;
        {
            std::latch start(4);
            std::vector<std::jthread> threads;
            for (int i = 0; i < 4; ++i) {
                threads.emplace_back([&] {
                    StepLease lease = cache.begin_step(
                        {.layer = LayerId{0}, .experts = Ids{1, 3, 5, 7, 9, 11, 13, 15}});
                    start.arrive_and_wait();
                    std::vector<ReadyExpert> ready;
                    const auto [code, message] = thrown_by([&] { lease.acquire_all(ready); });
                    if (!message.empty() && code == ErrorCode::kRead) ++told;
                });
            }
        }
        CHECK_EQ(told.load(), fails ? 4 : 0);
        CHECK(total(cache).demand_bytes <= 8 * static_cast<int64_t>(world.catalog->expert_bytes()));
        if (!fails) {
            CHECK_EQ(total(cache).demand_bytes,
                     8 * static_cast<int64_t>(world.catalog->expert_bytes()));
        }
    }
}

void wait_until_resident(const ExpertCache& cache, int32_t layer, size_t count) {
    while (cache.resident(LayerId{layer}).size() < count) std::this_thread::sleep_for(1ms);
}

void check_prefetch(uint64_t seed) {
    const CacheWorld world(2, 8, seed);
    const auto bytes = static_cast<int64_t>(world.catalog->expert_bytes());
    ExpertCache cache = world.cache(4, "lru");
    CHECK_EQ(cache.prefetch(LayerId{1}, Ids{0, 1, 2, 0}), 3);
    CHECK_EQ(cache.prefetch(LayerId{1}, Ids{0, 1, 2}), 0);
    wait_until_resident(cache, 1, 3);
    CHECK_EQ(total(cache).prefetch_bytes, 3 * bytes);
    run_step(world, cache, 1, {1, 0});
    CHECK_EQ(total(cache).hits, int64_t{2});
    CHECK_EQ(total(cache).prefetch_useful_bytes, 2 * bytes);
    run_step(world, cache, 0, {4, 5, 6, 7});  // evicts all, 1/2 unused
    CHECK_EQ(total(cache).prefetch_wasted_bytes, bytes);
    CHECK_EQ(total(cache).evictions, int64_t{3});
    // Asked for while still on its way, or just there: useful either way.
    CHECK_EQ(cache.prefetch(LayerId{1}, Ids{3}), 1);
    run_step(world, cache, 1, {3});
    CHECK_EQ(total(cache).prefetch_bytes, 4 * bytes);
    CHECK_EQ(total(cache).prefetch_useful_bytes, 3 * bytes);
    CHECK_EQ(total(cache).demand_bytes, 4 * bytes);
    // Unused ones go to waste with their slots.
    CHECK_EQ(cache.prefetch(LayerId{1}, Ids{4, 5, 6, 7}), 4);
    wait_until_resident(cache, 1, 4);
    cache.resize(1);
    CHECK_EQ(total(cache).prefetch_wasted_bytes, 4 * bytes);
    // Every slot leased: nothing to be had, and no harm done.
    std::optional<StepLease> held;
    (void)acquire(world, cache, 0, {2}, held);
    CHECK_EQ(cache.prefetch(LayerId{1}, Ids{0, 1}), 0);
}

void check_resize(uint64_t seed) {
    const CacheWorld world(1, 12, seed);
    ExpertCache cache = world.cache(2, "lru");
    const std::byte* const address = cache.pool().data();
    cache.resize(12);
    run_step(world, cache, 0, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});
    CHECK_EQ(cache.resident(LayerId{0}).size(), size_t{12});
    cache.resize(5);
    CHECK_EQ(cache.resident(LayerId{0}).size(), size_t{5});
    cache.resize(9);
    CHECK_EQ(cache.slots(), 9);
    CHECK(cache.pool().data() == address);

    // A shrink waits for another thread's lease, which keeps its bytes until it ends.
    cache.reset_stats();
    std::optional<StepLease> held;
    Ids nine{0, 1, 2, 3, 4, 5, 6, 7, 8};
    const IdList<SlotId> slots = acquire(world, cache, 0, nine, held);
    std::atomic<bool> shrunk = false;
    std::jthread shrinking([&] {
        cache.resize(1);
        shrunk = true;
    });
    while (cache.slots() != 1) std::this_thread::sleep_for(1ms);
    run_step(world, cache, 0, {9, 10, 11});
    CHECK(!shrunk);
    for (size_t i = 0; i < nine.size(); ++i) CHECK(world.holds(cache, slots[i], 0, nine[i]));
    held.reset();
    shrinking.join();
    CHECK(shrunk);
    CHECK_EQ(cache.resident(LayerId{0}).size(), size_t{1});
    run_step(world, cache, 0, nine);
}

struct Interrupted {};

// An exception from `poll` ends a wait and changes nothing else.
void check_poll(uint64_t seed) {
    const CacheWorld world(1, 8, seed);
    std::atomic<bool> interrupt = false;
    ExpertCache cache(world.catalog, world.options(4, "lru", [&] {
        if (interrupt) throw Interrupted();
    }));
    std::optional<StepLease> held;
    const IdList<SlotId> slots = acquire(world, cache, 0, {0, 1, 2, 3}, held);
    interrupt = true;
    const auto interrupted = [&](const auto& action) {
        bool caught = false;
        std::jthread([&] {
            try {
                action();
            } catch (const Interrupted&) {
                caught = true;
            }
        }).join();
        return caught;
    };
    CHECK(interrupted([&] { cache.resize(2); }));
    CHECK_EQ(cache.slots(), 4);
    CHECK(interrupted([&] {
        std::optional<StepLease> more;
        (void)acquire(world, cache, 0, {4, 5}, more);
    }));
    CHECK(total(cache).stall_seconds > 0);
    interrupt = false;
    for (int32_t i = 0; i < 4; ++i)
        CHECK(world.holds(cache, slots[static_cast<size_t>(i)], 0, ExpertIndex{i}));
    held.reset();
    run_step(world, cache, 0, {0, 1, 2, 3, 4, 5, 6, 7});
    CHECK_EQ(cache.resident(LayerId{0}).size(), size_t{4});
}

void check_lifetimes(uint64_t seed) {
    const CacheWorld world(1, 16, seed);
    Ids all(16);
    for (int32_t i = 0; i < 16; ++i) all[static_cast<size_t>(i)] = ExpertIndex{i};
    for (int round = 0; round < 20; ++round) {
        // A lease dropped with its reads in flight, and a cache dropped with prefetches in flight.
        auto cache = std::make_unique<ExpertCache>(world.catalog, world.options(8, "decayed_lfu"));
        (void)cache->prefetch(LayerId{0}, all);
        (void)cache->begin_step({.layer = LayerId{0}, .experts = all});
        StepLease outlives = cache->begin_step({.layer = LayerId{0}, .experts = Ids{3, 9}});
        StepLease moved = std::move(outlives);
        cache.reset();
        std::vector<ReadyExpert> ready;
        moved.acquire_all(ready);
        CHECK_EQ(ready.size(), size_t{2});
    }
}

void check_fork(uint64_t seed) {
    const CacheWorld world(1, 4, seed);
    auto cache = std::make_unique<ExpertCache>(world.catalog, world.options(2, "lru"));
    run_step(world, *cache, 0, {1, 2});
    auto lease =
        std::make_unique<StepLease>(cache->begin_step({.layer = LayerId{0}, .experts = Ids{0}}));
    const pid_t child = fork();
    if (child == 0) {
        int refused = 0;
        std::vector<ReadyExpert> ready;
        const auto check = [&](const auto& action) {
            const auto [code, message] = thrown_by(action);
            if (!message.empty() && code == ErrorCode::kUnsupported) ++refused;
        };
        check([&] { (void)cache->begin_step({.layer = LayerId{0}, .experts = Ids{1}}); });
        check([&] { (void)lease->wait_ready(ready); });
        check([&] { (void)cache->stats(); });
        lease.reset();
        cache.reset();
        _exit(refused);
    }
    int status = 0;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status));
    CHECK_EQ(WEXITSTATUS(status), 3);
    std::vector<ReadyExpert> ready;
    CHECK(lease->wait_ready(ready));
}

}  // namespace

int main() {
    const uint64_t seed = drawn_seed();
    for (const std::string& policy : kModelledPolicies) {
        for (int32_t slots = 1; slots <= 18; ++slots) {
            check_matches_the_model(policy, slots, seed + static_cast<uint64_t>(slots));
        }
    }
    check_leases_survive_pressure(seed);
    check_capacity(seed);
    check_two_threads_in_staging_slots(seed);
    check_bad_requests(seed);
    check_failed_reads(seed);
    check_one_read_for_all(seed);
    check_prefetch(seed);
    check_resize(seed);
    check_poll(seed);
    check_lifetimes(seed);
    check_fork(seed);
    return test_result();
}
