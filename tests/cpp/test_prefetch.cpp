// What the prefetcher promises: it keeps to its budget, drives out nothing that is expected, stops
// where predictions are wrong, comes back when they are right, and changes no byte of any step.
#include <algorithm>
#include <deque>
#include <functional>
#include <set>
#include <thread>

#include "base/error.h"
#include "cache_world.h"
#include "check.h"
#include "prefetch/prefetcher.h"

using namespace moeinf;

namespace {

using Ids = FlatExperts;

constexpr int32_t kLayers = 4;
constexpr int32_t kExperts = 8;
constexpr int32_t kSlots = 6;  // less than a token uses: lru alone never hits
constexpr int64_t kBytes = 1000;
constexpr double kRead = 0.004;  // seconds per expert
constexpr ModelShape kShape{kLayers, kExperts};

// A link that carries one expert at a time, demand first, and a clock that steps through it.
class Machine {
public:
    explicit Machine(const std::string& name)
        : residency(kShape, kSlots, make_policy("lru", kShape)),
          prefetcher(make_prefetcher(name, kShape, {kBytes, kBytes / 4})) {}

    // Reads until `until`, or until no demand is left.
    void pass_time(double until, bool only_demands) {
        while (!demands_.empty() || (!only_demands && !prefetches_.empty())) {
            auto& queue = demands_.empty() ? prefetches_ : demands_;
            Read& read = queue.front();
            const double end = now + read.left;
            if (!only_demands && end > until) {
                read.left -= std::max(0.0, until - now);
                break;
            }
            now = end;
            const bool demand = &queue == &demands_;
            prefetcher->read_ended(read.expert, demand, true, now);
            residency.unpin(read.expert);
            queue.pop_front();
        }
        if (!only_demands) now = std::max(now, until);
    }

    void step(int32_t layer, const Ids& experts, double compute, bool prefill = false,
              bool new_sequence = false) {
        const std::vector<int32_t> counts(experts.size(), 1);
        const Step step{.index = steps++,
                        .layer = LayerId{layer},
                        .experts = experts,
                        .counts = counts,
                        .router = {},
                        .prefill = prefill,
                        .new_sequence = new_sequence};
        const double before = now;
        prefetcher->on_step(step, now);
        StepPlan plan;
        residency.plan(step, plan);
        for (const Placement& one : plan.placements) {
            prefetcher->on_demand_miss(one.expert);
            start(one.expert, demands_, true);
        }
        for (const ExpertId expert : plan.surplus) prefetcher->on_demand_miss(expert);
        for (const ExpertId hit : plan.hits) {
            residency.pin(hit);
            // Late: what is left of it is waited for.
            const auto late = std::ranges::find(prefetches_, hit, &Read::expert);
            if (late != prefetches_.end()) {
                now += late->left;
                prefetcher->read_ended(hit, false, true, now);
                residency.unpin(hit);
                prefetches_.erase(late);
            }
        }
        for (const Placement& one : plan.placements) residency.pin(one.expert);
        prefetcher->look_ahead(step, now);
        prefetch(experts, compute);
        pass_time(0, true);
        stalled += now - before;
        pass_time(now + compute, false);
        for (const ExpertId hit : plan.hits) residency.unpin(hit);
        for (const Placement& one : plan.placements) residency.unpin(one.expert);
    }

    // Starts what is wanted after a step that used `experts` and computes for so long.
    void prefetch(const Ids& experts, double compute) {
        const auto wanted = prefetcher->choose(residency);
        const auto expected = prefetcher->expected_residents();
        // What the idle time carries, and what it left over before: never more than two of each.
        CHECK(static_cast<double>(wanted.size()) <= 2 * (compute / kRead + 1));
        CHECK(wanted.size() + prefetches_.size() <= size_t(kSlots) / 4);
        for (const ExpertId expert : expected) residency.pin(expert);
        for (const ExpertId expert : wanted) {
            CHECK(!residency.resident(expert));
            Placement placement{};
            if (!residency.place(expert, placement)) break;
            CHECK(std::ranges::find(experts, placement.evicted) == experts.end());
            CHECK(std::ranges::find(expected, placement.evicted) == expected.end());
            start(expert, prefetches_, false);
            prefetcher->on_issued(expert, placement.evicted);
            ++fetched;
        }
        for (const ExpertId expert : expected) residency.unpin(expert);
    }

    double now = 0, stalled = 0;
    int64_t steps = 0, fetched = 0;
    Residency residency;
    std::unique_ptr<Prefetcher> prefetcher;

private:
    struct Read {
        ExpertId expert;
        double left = kRead;
    };

    void start(ExpertId expert, std::deque<Read>& queue, bool demand) {
        residency.pin(expert);
        prefetcher->read_started(expert, demand, now);
        queue.push_back({expert});
    }

    std::deque<Read> demands_, prefetches_;
};

Ids pair_of(int32_t layer, int32_t which) {
    return {layer * kExperts + 2 * which, layer * kExperts + 2 * which + 1};
}

void decode(Machine& machine, int tokens, double compute,
            const std::function<Ids(int32_t, int)>& route) {
    for (int token = 0; token < tokens; ++token) {
        for (int32_t layer = 0; layer < kLayers; ++layer) {
            machine.step(layer, route(layer, token), compute);
        }
    }
}

Ids same(int32_t layer, int /*token*/) {
    return pair_of(layer, 1);
}
Ids alternating(int32_t layer, int token) {
    return pair_of(layer, token % 2);
}

TEST("it helps stops and returns") {
    Machine machine("previous");
    CHECK(machine.prefetcher->stats().state !=
          PrefetchTrial::State::kOn);  // until it is known to pay
    decode(machine, 40, 0.01, same);
    CHECK(machine.prefetcher->stats().state == PrefetchTrial::State::kOn);
    CHECK(machine.prefetcher->stats().gain > 0.1);
    CHECK(machine.fetched > 30);
    const double before = machine.stalled;
    decode(machine, 30, 0.01, same);
    // Without prefetching every expert is a miss: 30 tokens of 4 layers of 2 reads.
    CHECK(machine.stalled - before < 0.7 * 30 * kLayers * 2 * kRead);

    // What the token before used is now always wrong.
    decode(machine, 60, 0.01, alternating);
    CHECK(machine.prefetcher->stats().state != PrefetchTrial::State::kOn);
    const int64_t wrong = machine.fetched;
    decode(machine, 200, 0.01, alternating);
    CHECK_EQ(machine.fetched, wrong);

    decode(machine, 140, 0.01, same);  // after its rest
    CHECK(machine.prefetcher->stats().state == PrefetchTrial::State::kOn);
    CHECK(machine.fetched > wrong + 30);
    CHECK(machine.prefetcher->stats().switches >= 3);
}

TEST("a busy link carries none") {
    Machine machine("previous");
    decode(machine, 60, 0.0, same);  // the next step begins when the last read ends
    CHECK_EQ(machine.fetched, int64_t{0});
    decode(machine, 60, kRead / 4, same);  // room for a quarter of an expert per step
    CHECK(machine.fetched > 0);
    CHECK(machine.fetched <= 60 * kLayers / 4 + 1);
}

TEST("prompts are left alone") {
    Machine machine("transition");
    for (int request = 0; request < 30; ++request) {
        for (int32_t layer = 0; layer < kLayers; ++layer) {
            machine.step(layer, same(layer, 0), 0.01, true, layer == 0);
        }
    }
    CHECK_EQ(machine.fetched, int64_t{0});
    CHECK_EQ(machine.prefetcher->stats().steps, int64_t{0});
}

TEST("hints are counted") {
    Machine machine("external");
    const auto run = [&](int tokens) {
        for (int token = 0; token < tokens; ++token) {
            for (int32_t layer = 0; layer < kLayers; ++layer) {
                if (layer > 0) {  // one right, one wrong
                    const Ids hint{layer * kExperts + 2, layer * kExperts + 7};
                    machine.prefetcher->on_external(LayerId{layer}, hint);
                }
                machine.step(layer, same(layer, token), 0.01);
            }
        }
    };
    run(40);
    const PredictionStats stats = machine.prefetcher->stats();
    CHECK_EQ(stats.predictor, std::string("external"));
    CHECK_EQ(stats.steps, int64_t{40 * (kLayers - 1)});
    CHECK_EQ(stats.used, 2 * stats.steps);
    CHECK_EQ(stats.predicted, 2 * stats.steps);
    CHECK_EQ(stats.correct, stats.steps);
    CHECK(stats.predicted_absent >= stats.fetched);
    CHECK(stats.predicted_absent_used <= stats.predicted_absent);
    machine.prefetcher->reset_stats();
    CHECK_EQ(machine.prefetcher->stats().steps, int64_t{0});
}

// A prediction that takes longer to make than it saves is not asked for again and again, however
// right it is.
TEST("dear hints are refused") {
    Machine machine("external");
    int asked = 0;
    const auto run = [&](int tokens) {
        asked = 0;
        for (int token = 0; token < tokens; ++token) {
            for (int32_t layer = 0; layer < kLayers; ++layer) {
                machine.step(layer, same(layer, token), 0.01);
                if (!machine.prefetcher->wants_external()) continue;
                ++asked;
                const int32_t next = (layer + 1) % kLayers;
                machine.prefetcher->on_external(LayerId{next}, same(next, token));
                machine.prefetch(same(layer, token), 0.01);
                machine.pass_time(machine.now + 0.02, false);
            }
        }
    };
    run(1000);
    CHECK(machine.fetched > 0);
    CHECK(machine.prefetcher->stats().gain < 0);
    run(1000);
    CHECK(asked < 1000 * kLayers / 20);
    CHECK(machine.prefetcher->stats().state != PrefetchTrial::State::kOn);
}

// Real reads: every byte is right whatever is prefetched, and the books balance.
void check_live(const std::string& name, uint64_t seed) {
    const CacheWorld world(3, 6, seed);
    ExpertCacheOptions options = world.options(5, "decayed_lfu");
    options.prefetch = name;
    ExpertCache cache(world.catalog, options);
    std::mt19937_64 random(seed);
    const Experts held_experts{5};
    std::vector<ReadyExpert> held_ready;
    StepLease held =
        cache.begin_step({.layer = LayerId{2}, .experts = held_experts, .all_at_once = true});
    held.acquire_all(held_ready);
    int64_t accesses = 1;
    for (int token = 0; token < 150; ++token) {
        for (int32_t layer = 0; layer < 3; ++layer) {
            std::set<int32_t> chosen;
            while (chosen.size() < 2) {
                chosen.insert(static_cast<int32_t>(random() % (token % 50 < 30 ? 2 : 6)));
            }
            const Experts experts(chosen);
            accesses += 2;
            if (cache.wants_predictions()) cache.predict(LayerId{layer}, experts);
            StepLease lease = cache.begin_step({.layer = LayerId{layer},
                                                .experts = experts,
                                                .prefill = token % 50 == 0,
                                                .new_sequence = token % 50 == 0 && layer == 0});
            std::vector<ReadyExpert> ready;
            while (lease.wait_ready(ready)) continue;
            CHECK_EQ(ready.size(), size_t{2});
            std::this_thread::sleep_for(std::chrono::microseconds(200));  // an idle link
            for (const ReadyExpert& one : ready) {
                CHECK(world.holds(cache, one.slot, layer, experts[size_t(one.position)]));
            }
            CHECK(world.holds(cache, held_ready.at(0).slot, 2, ExpertIndex{5}));
        }
    }
    held.release();
    const PredictionStats stats = cache.prediction_stats();
    CHECK_EQ(stats.predictor, name);
    CHECK_EQ(name == "off", stats.steps == 0);
    CHECK(stats.correct <= std::min(stats.predicted, stats.used));
    CHECK(stats.late <= stats.fetched);
    int64_t counted = 0;
    for (const LayerStats& layer : cache.stats()) {
        counted += layer.accesses;
        CHECK_EQ(layer.hits + layer.misses, layer.accesses);
        CHECK(layer.prefetch_useful_bytes + layer.prefetch_wasted_bytes <= layer.prefetch_bytes);
        CHECK(name != "off" || layer.prefetch_bytes == 0);
    }
    CHECK_EQ(counted, accesses);
    std::cout << name << ": " << stats.fetched << " prefetched, " << stats.late << " late\n";
}

TEST("every byte is right whatever is prefetched") {
    for (const std::string& name : prefetch_names()) check_live(name, drawn_seed());
}

TEST("an unknown name is refused with those that exist") {
    const CacheWorld world(1, 2, drawn_seed());
    ExpertCacheOptions options = world.options(1, "lru");
    options.prefetch = "psychic";
    try {
        const ExpertCache cache(world.catalog, options);
        CHECK(false);
    } catch (const Error& error) {
        CHECK(std::string(error.what()).find("transition, eam, external") != std::string::npos);
    }
}

}  // namespace

int main(int argc, char** argv) {
    return run_tests(argc, argv);
}
