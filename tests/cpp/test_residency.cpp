// Residency and the policies against a model that keeps whole histories and recomputes every score
// from them: the same hits, misses, surplus and residents after every step, to the unit.
#include <algorithm>
#include <random>
#include <set>

#include "base/error.h"
#include "check.h"
#include "id_list.h"
#include "policy/policy.h"
#include "policy/residency.h"
#include "residency_model.h"
#include "scratch.h"

using namespace moeinf;

namespace {

void check_against_model(const std::string& policy, int layers, int experts, int slots, int tokens,
                         bool pins_and_prefetches, uint32_t seed) {
    const int failed_before = failed_checks;
    std::mt19937 random(seed);
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint32_t>(n)); };
    const ModelShape shape{layers, experts};
    Residency residency(shape, slots, make_policy(policy, shape));
    ResidencyModel model{policy, layers, experts, static_cast<size_t>(slots), -1, -1, 0,
                         {},     {},     {}};
    StepPlan plan;
    Placement placement;
    for (int t = 0; t < tokens; ++t) {
        const bool prefill = below(8) == 0;
        for (int layer = 0; layer < layers; ++layer) {
            std::set<int> held;
            if (pins_and_prefetches) {
                for (int e : std::set<int>(model.resident)) {
                    if (below(4) == 0) held.insert(e);
                }
                for (int e : held) residency.pin(ExpertId{e});
                const int wanted = below(shape.total());
                if (model.resident.count(wanted) == 0) {
                    const bool had = model.admit(wanted, held);
                    CHECK_EQ(residency.place(ExpertId{wanted}, placement), had);
                }
            }
            // Skewed, so that policies have something to find out.
            std::set<int> chosen;
            const size_t k = static_cast<size_t>(1 + below(prefill ? experts : 3));
            while (chosen.size() < std::min<size_t>(k, static_cast<size_t>(experts))) {
                chosen.insert(layer * experts + std::min(below(experts), below(experts)));
            }
            std::vector<int> members(chosen.begin(), chosen.end());
            std::shuffle(members.begin(), members.end(), random);
            const std::vector<int32_t> counts(members.size(), 1);
            const bool new_sequence = layer == 0 && prefill;
            const FlatExperts experts_of_step(members);
            residency.plan({.index = static_cast<int64_t>(t) * layers + layer,
                            .layer = LayerId{layer},
                            .experts = experts_of_step,
                            .counts = counts,
                            .router = {},
                            .prefill = prefill,
                            .new_sequence = new_sequence},
                           plan);
            const auto [hits, placed] = model.take(layer, members, new_sequence, held);
            CHECK_EQ(static_cast<int>(plan.hits.size()), hits);
            CHECK_EQ(static_cast<int>(plan.placements.size()), placed);
            CHECK_EQ(plan.hits.size() + plan.placements.size() + plan.surplus.size(),
                     members.size());
            std::set<int> resident;
            for (const FrameId frame : all_ids<FrameId>(residency.frames())) {
                const ExpertId e = residency.residents()[index(frame)];
                if (!is_some(e)) continue;
                resident.insert(number(e));
                CHECK_EQ(residency.frame_of(e), frame);
            }
            CHECK(resident == model.resident);
            for (int e : held) residency.unpin(ExpertId{e});
            if (failed_checks > failed_before) {
                std::cerr << policy << ", " << slots << " slots, seed " << seed << ", token " << t
                          << ", layer " << layer << "\n";
                return;
            }
        }
    }
}

// 200,000 tokens later the weights have been scaled down many times; the choice must still be that
// of the most recent uses, and what was never used again must still leave first.
TEST("long decay") {
    const ModelShape shape{1, 4};
    auto policy = make_policy("decayed_lfu", shape);
    const FlatExperts once{3}, residents{0, 1, 2, 3};
    const Pins pins(4);
    const auto observe = [&](int64_t index, const FlatExperts& experts) {
        policy->observe(
            {.index = index, .layer = LayerId{0}, .experts = experts, .counts = {}, .router = {}});
    };
    observe(0, once);
    for (const ExpertId expert : residents) policy->inserted(expert);
    for (int i = 1; i < 200000; ++i) observe(i, {i % 3});
    FlatExperts victims(4);
    CHECK_EQ(policy->choose_victims(residents, pins, victims), size_t{4});
    CHECK((victims == FlatExperts{3, 2, 0, 1}));  // 1 was used last, 3 never again
}

// Whatever was resident before and is pinned now: the step of a long prompt evicts nothing that a
// layer keeps and leaves no other layer below its share; the next short step decides alone again.
TEST("long prompts leave each layer its share") {
    std::mt19937 random(static_cast<uint32_t>(drawn_seed()));
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint32_t>(n)); };
    for (int round = 0; round < 300; ++round) {
        const ModelShape shape{1 + below(5), 2 + below(12)};
        const int32_t frames = 1 + below(shape.total());
        const int32_t share = std::max(1, (frames - frames / 8) / shape.num_layers);
        Residency residency(shape, frames, make_policy(round % 2 ? "lru" : "learned", shape));
        StepPlan plan;
        const auto count = [&](LayerId layer) {
            int32_t found = 0;
            for (const ExpertId e : shape.experts_of(layer)) found += residency.resident(e);
            return found;
        };
        for (int index = 0; index < 12 * shape.num_layers; ++index) {
            const LayerId layer{index % shape.num_layers};
            const bool is_long = below(3) > 0;
            FlatExperts experts;
            std::vector<int32_t> counts;
            std::vector<float> recent;
            for (const ExpertId e : shape.experts_of(layer)) {
                if (below(8) == 0) continue;
                experts.push_back(e);
                counts.push_back(1 + below(9));
                recent.push_back(static_cast<float>(below(4)));
            }
            if (experts.empty()) continue;
            std::set<ExpertId> kept_elsewhere;
            std::vector<int32_t> before;
            for (const LayerId other : shape.layers()) {
                before.push_back(count(other));
                if (other == layer) continue;
                for (const ExpertId e : shape.experts_of(other)) {
                    if (residency.keeps(e) && residency.resident(e)) kept_elsewhere.insert(e);
                }
            }
            residency.plan(
                {.index = index,
                 .layer = layer,
                 .experts = experts,
                 .counts = counts,
                 .recent = is_long ? std::span<const float>(recent) : std::span<const float>(),
                 .router = {},
                 .prefill = true},
                plan);
            CHECK_EQ(plan.hits.size() + plan.placements.size() + plan.surplus.size(),
                     experts.size());
            if (!is_long) {
                for (const ExpertId e : shape.experts()) CHECK(!residency.keeps(e));
                continue;
            }
            for (const ExpertId e : kept_elsewhere) CHECK(residency.resident(e));
            for (const LayerId other : shape.layers()) {
                if (other == layer) continue;
                CHECK(count(other) >= std::min(before[moeinf::index(other)], share));
            }
            // Kept are those that the latest tokens use most.
            float least_kept = 1e9f, most_other = -1;
            int32_t kept = 0;
            for (size_t i = 0; i < experts.size(); ++i) {
                kept += residency.keeps(experts[i]);
                float& bound = residency.keeps(experts[i]) ? least_kept : most_other;
                bound = residency.keeps(experts[i]) ? std::min(bound, recent[i])
                                                    : std::max(bound, recent[i]);
            }
            CHECK_EQ(kept, std::min(share, static_cast<int32_t>(experts.size())));
            CHECK(least_kept >= most_other);
        }
    }
}

TEST("shrinking") {
    const ModelShape shape{1, 8};
    Residency residency(shape, 4, make_policy("lru", shape));
    Placement placement;
    for (int32_t e = 0; e < 4; ++e) CHECK(residency.place(ExpertId{e}, placement));
    const ExpertId held = residency.residents()[3];
    const ExpertId kept = residency.residents()[0];
    residency.pin(held);
    residency.resize(1);
    // frames: [kept | closed: free, free, held]
    CHECK_EQ(residency.frames(), 1);
    CHECK_EQ(residency.occupied_closed_frames(), 1);
    CHECK_EQ(residency.frame_of(held), FrameId{3});
    CHECK_EQ(residency.frame_of(kept), FrameId{0});
    CHECK(residency.place(ExpertId{7}, placement));
    CHECK_EQ(placement.evicted, kept);
    residency.pin(ExpertId{7});
    CHECK(!residency.place(ExpertId{6}, placement));  // only the closed frames have room
    residency.resize(3);
    CHECK(residency.place(ExpertId{6}, placement));
    CHECK(residency.place(ExpertId{5}, placement));
    CHECK_EQ(residency.occupied_closed_frames(), 1);
    residency.unpin(held);
    residency.remove(held);
    CHECK_EQ(residency.occupied_closed_frames(), 0);
    CHECK_EQ(residency.residents().size(), size_t{3});
    residency.resize(4);
    CHECK(residency.place(held, placement));
    CHECK_EQ(placement.frame, FrameId{3});
}

TEST("errors") {
    const ModelShape shape{2, 4};
    const auto message = [](auto action) -> std::string {
        try {
            action();
        } catch (const Error& error) {
            return error.code() == ErrorCode::kInvalid ? error.what() : "wrong code";
        }
        return "nothing thrown";
    };
    CHECK(message([&] { (void)make_policy("fifo", shape); }).find("fifo") != std::string::npos);
    CHECK(message([&] { (void)make_policy("fifo", shape); }).find("lru") != std::string::npos);
    CHECK(message([&] { Residency(shape, 0, make_policy("lru", shape)); }).find("0") !=
          std::string::npos);
    CHECK(message([&] { Residency(shape, 1, nullptr); }).find("policy") != std::string::npos);
    for (const std::string& name : policy_names()) {
        CHECK_EQ(std::string(make_policy(name, shape)->name()), name);
    }
}

TEST("residents are those of the model after every step") {
    const auto seed = static_cast<uint32_t>(drawn_seed());
    for (const std::string& policy : kModelledPolicies) {
        for (const bool pins : {false, true}) {
            for (int slots = 1; slots <= 3 * 7; ++slots) {
                check_against_model(policy, 3, 7, slots, 40, pins,
                                    seed + static_cast<uint32_t>(slots));
            }
            check_against_model(policy, 5, 13, 17, 60, pins, seed);
            check_against_model(policy, 1, 33, 9, 120, pins, seed);
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    return run_tests(argc, argv);
}
