// The simulator against live use of the same classes, and the default policy's promises: what holds
// however residency is driven, with prefetches, pins, removals and resizes in between.
#include <cmath>
#include <cstring>
#include <random>
#include <set>

#include "base/error.h"
#include "check.h"
#include "id_list.h"
#include "policy/policies/learned_kernels.h"
#include "policy/residency.h"
#include "scratch.h"
#include "trace/belady.h"
#include "trace/simulator.h"

using namespace moeinf;

namespace {

struct Recorded {
    ModelShape shape;
    int32_t k;
    std::vector<int16_t> experts;
    std::vector<int32_t> sequence;
    std::vector<uint8_t> phase;

    TraceView view() const {
        TraceView trace;
        trace.tokens = static_cast<int64_t>(sequence.size());
        trace.layers = shape.num_layers;
        trace.num_experts = shape.num_experts;
        trace.k = k;
        trace.experts = experts;
        trace.sequence = sequence;
        trace.phase = phase;
        return trace;
    }
};

Recorded random_trace(std::mt19937& random, ModelShape shape, int32_t k, int tokens) {
    Recorded trace{shape, k, {}, {}, {}};
    std::vector<int16_t> ids(static_cast<size_t>(shape.num_experts));
    for (int t = 0; t < tokens; ++t) {
        trace.sequence.push_back(t / 40);
        trace.phase.push_back(t % 40 >= 7);
        for (int32_t layer = 0; layer < shape.num_layers; ++layer) {
            for (size_t e = 0; e < ids.size(); ++e) ids[e] = static_cast<int16_t>(e);
            // Skewed: an earlier id is likelier to be swapped to the front.
            for (int32_t i = 0; i < k; ++i) {
                const int32_t span = shape.num_experts - i;
                const int32_t pick = i + std::min<int32_t>(random() % span, random() % span);
                std::swap(ids[static_cast<size_t>(i)], ids[static_cast<size_t>(pick)]);
                trace.experts.push_back(random() % 20 == 0 ? int16_t{-1}
                                                           : ids[static_cast<size_t>(i)]);
            }
        }
    }
    return trace;
}

TEST("simulation counts what residency did") {
    std::mt19937 random(static_cast<uint32_t>(drawn_seed()));
    const Recorded trace = random_trace(random, {6, 13}, 3, 160);
    for (const std::string& name : policy_names()) {
        Residency residency({6, 13}, 19, make_policy(name, {6, 13}));
        StepPlan plan;
        int64_t hits = 0;
        StepReader reader(trace.view());
        for (Step step; reader.next(step);) {
            residency.plan(step, plan);
            hits += static_cast<int64_t>(plan.hits.size());
        }
        int64_t counted = 0;
        for (const LayerCounts& layer :
             simulate(trace.view(), 19, make_policy(name, {6, 13}), {})) {
            counted += layer.decode_hits + layer.prefill_hits;
        }
        CHECK_EQ(hits, counted);
    }
}

// No order of prefetches, pins, removals and resizes makes a policy name an absent or pinned
// expert (residency throws if it does), and no expert sits in two frames.
TEST("policies survive whatever an owner does") {
    std::mt19937 random(static_cast<uint32_t>(drawn_seed()));
    const ModelShape shape{5, 9};
    const Recorded trace = random_trace(random, shape, 3, 120);
    for (const std::string& name : policy_names()) {
        Residency residency(shape, 12, make_policy(name, shape));
        StepPlan plan;
        std::vector<ExpertId> pinned;
        std::vector<float> priors(static_cast<size_t>(shape.total()), 0.5f);
        StepReader reader(trace.view());
        for (Step step; reader.next(step);) {
            residency.plan(step, plan);
            for (const ExpertId expert : pinned) residency.unpin(expert);
            pinned.clear();
            const auto total = static_cast<uint32_t>(shape.total());
            const ExpertId any{static_cast<int32_t>(random() % total)};
            switch (random() % 6) {
                case 0: {
                    Placement placement;
                    if (!residency.resident(any)) residency.place(any, placement);
                    break;
                }
                case 1:
                    if (residency.resident(any)) residency.remove(any);
                    break;
                case 2:
                    for (const ExpertId expert : residency.residents()) {
                        if (is_some(expert) && random() % 3 == 0) {
                            residency.pin(expert);
                            pinned.push_back(expert);
                        }
                    }
                    break;
                case 3:
                    residency.resize(1 + static_cast<int32_t>(random() % 20));
                    break;
                case 4:
                    for (float& prior : priors) prior = static_cast<float>(random() % 101) / 100;
                    residency.policy().set_priors(priors);
                    break;
                default:
                    break;
            }
            std::set<ExpertId> seen;
            for (const ExpertId expert : residency.residents()) {
                if (is_some(expert)) CHECK(seen.insert(expert).second);
            }
        }
    }
}

// Whole batches and prompts route to every expert of a layer; estimates must stay numbers.
TEST("learned takes steps of any size") {
    const ModelShape shape{4, 200};
    Residency residency(shape, 300, make_policy("learned", shape));
    std::mt19937 random(3);
    StepPlan plan;
    int64_t hits = 0;
    for (int64_t index = 0; index < 4000; ++index) {
        FlatExperts experts;
        std::vector<int32_t> counts;
        const auto layer = static_cast<int32_t>(index % 4);
        const uint32_t size = index % 9 == 0 ? 200 : random() % 40;
        std::set<int32_t> distinct;
        while (distinct.size() < size) distinct.insert(static_cast<int32_t>(random() % 200));
        for (const int32_t e : distinct) {
            experts.push_back(ExpertId{layer * 200 + e});
            counts.push_back(1 + static_cast<int32_t>(random() % 4000));
        }
        Step step;
        step.index = index;
        step.layer = LayerId{layer};
        step.experts = experts;
        step.counts = counts;
        step.prefill = index % 3 == 0;
        step.new_sequence = index % 40 == 0;
        residency.plan(step, plan);
        CHECK_EQ(plan.hits.size() + plan.placements.size() + plan.surplus.size(), experts.size());
        hits += static_cast<int64_t>(plan.hits.size());
    }
    CHECK(hits > 0);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// A simulation on one machine must match a live run on another.
TEST("every instruction set gives the same bits") {
    std::mt19937 random(static_cast<uint32_t>(drawn_seed()));
    const learned::Kernels& portable = learned::kPortable;
    const learned::Kernels& fastest = learned::fastest_kernels();
    std::cout << "kernels: " << fastest.name << "\n";
    std::uniform_real_distribution<float> wide(-12.0f, 12.0f), positive(0.0f, 30.0f);
    for (const size_t n : {1, 3, 7, 8, 9, 31, 32, 33, 60, 127, 128, 385}) {
        const auto drawn = [&](auto& distribution) {
            std::vector<float> values(n);
            for (float& value : values) value = distribution(random);
            return values;
        };
        auto counts = drawn(positive);
        for (float& count : counts) count = random() % 2 == 0 ? count : 0.0f;
        const auto uses = drawn(positive), slow = drawn(positive), sequence = drawn(positive),
                   unused = drawn(positive), bias = drawn(wide), values = drawn(wide);
        const learned::History history{uses.data(),   slow.data(), sequence.data(),
                                       unused.data(), bias.data(), 0.3f,
                                       0.02f,         0.01f,       0.03f};
        // Of three rows, one starts off any boundary.
        const auto first = drawn(wide), second = drawn(wide), third = drawn(wide);
        std::vector<float> results[2][8];
        for (int which = 0; which < 2; ++which) {
            const learned::Kernels& kernels = which == 0 ? portable : fastest;
            auto& [decayed, sums, errors, logistic, since, added, row, shifted] = results[which];
            decayed = uses;
            kernels.decay(decayed.data(), counts.data(), 0.8f, 1.7f, n);
            sums.resize(n);
            kernels.begin_sums(history, sums.data(), n);
            kernels.add(sums.data(), values.data(), 0.37f, n);
            errors.resize(n);
            kernels.outcomes(counts.data(), sums.data(), values.data(), 0.6f, errors.data(), n);
            logistic.resize(n);
            kernels.logistic(sums.data(), logistic.data(), n);
            since = unused;
            kernels.count_visits(since.data(), bias.data(), n);
            added = values;
            const float* const rows[] = {first.data(), second.data(), third.data()};
            kernels.add_rows(added.data(), rows, 3, n);
            row = first;
            shifted = second;
            shifted.insert(shifted.begin(), 0.0f);
            float* const learning[] = {row.data(), shifted.data() + 1};
            const float rates[] = {0.7f, -0.01f};
            kernels.learn_rows(learning, rates, 2, errors.data(), n);
        }
        for (int i = 0; i < 8; ++i) CHECK(same_bits(results[0][i], results[1][i]));
        for (size_t e = 0; e < n; ++e) {
            const auto& [decayed, sums, errors, logistic, since, added, row, shifted] = results[1];
            CHECK_EQ(since[e], bias[e] > 0 ? 0.0f : unused[e] + 1);
            CHECK_EQ(added[e], ((values[e] + first[e]) + second[e]) + third[e]);
            CHECK_EQ(row[e], first[e] + errors[e] * 0.7f);
            CHECK_EQ(shifted[e + 1], second[e] + errors[e] * -0.01f);
            const float later = 0.6f / (1 + std::exp(-sums[e]));
            CHECK(std::abs(errors[e] - ((counts[e] > 0 ? 1.0f : later) - values[e])) < 1e-3f);
        }
        for (size_t e = 0; e < n; ++e) {
            const auto odds = [](double rate) {
                const double kept = std::min(std::max(rate, 0.002), 0.998);
                return std::log(kept / (1 - kept));
            };
            const double slow_rate = (slow[e] + 0.3) * 0.01;
            const double expected = -0.05 + bias[e] + 0.25 * odds((uses[e] + 0.3) * 0.02) +
                                    0.1 * odds(slow_rate) +
                                    0.3 * odds((sequence[e] + 4.0 * slow_rate) * 0.03) +
                                    0.5 / (1.0 + unused[e]) + 0.37 * values[e];
            CHECK(std::abs(results[0][1][e] - expected) < 1e-3);
            const double chance = 1 / (1 + std::exp(-static_cast<double>(results[0][1][e])));
            CHECK(std::abs(results[0][3][e] - chance) < 1e-3 * chance + 1e-7);
        }
    }
}

TEST("a bad trace is refused") {
    std::mt19937 random(1);
    const Recorded good = random_trace(random, {2, 5}, 2, 50);
    check_trace(good.view(), "good");
    const auto refused = [](const Recorded& trace) {
        try {
            check_trace(trace.view(), "bad");
        } catch (const Error& error) {
            return error.code() == ErrorCode::kInvalid;
        }
        return false;
    };
    Recorded bad = good;
    bad.experts[17] = 5;
    CHECK(refused(bad));
    bad = good;
    bad.experts.pop_back();
    CHECK(refused(bad));
    bad = good;
    bad.phase[3] = 7;
    CHECK(refused(bad));
    bad = good;
    bad.sequence[49] = 0;
    CHECK(refused(bad));
}

}  // namespace

int main(int argc, char** argv) {
    return run_tests(argc, argv);
}
