// Each predictor against its definition, computed anew from the whole history in float64.
#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>

#include "base/error.h"
#include "check.h"
#include "id_list.h"
#include "prefetch/predictor.h"
#include "scratch.h"

using namespace moeinf;

namespace {

constexpr int kLayers = 4;
constexpr int kExperts = 7;

struct Seen {
    int layer;
    std::vector<int32_t> experts, counts;
    bool prefill, new_sequence;
    [[nodiscard]] bool has(int expert) const {
        return std::ranges::find(experts, expert) != experts.end();
    }
};
using History = std::vector<Seen>;
using Row = std::vector<double>;

Row previous(const History& history, int layer) {
    Row row(kExperts);
    int age = 0;
    for (auto step = history.rbegin(); step != history.rend(); ++step) {
        if (step->layer != layer) continue;
        ++age;
        const int most = *std::ranges::max_element(step->counts);
        for (size_t i = 0; i < step->experts.size(); ++i) {
            const double use = step->prefill ? static_cast<double>(step->counts[i]) / most : 1.0;
            row[static_cast<size_t>(step->experts[i] % kExperts)] += use * std::pow(0.5, age);
        }
    }
    return row;
}

Row transition(const History& history, int layer) {
    Row row(kExperts);
    for (const int a : history.back().experts) {
        for (int b = 0; b < kExperts; ++b) {
            double estimate = 0;
            int uses = 0;
            for (size_t i = 1; i < history.size(); ++i) {
                const Seen& from = history[i - 1];
                const Seen& to = history[i];
                if (!from.has(a) || from.prefill || to.prefill || to.new_sequence) continue;
                ++uses;
                const double rate = std::max(0.02, 1.0 / (uses + 1));
                estimate = (1 - rate) * estimate + rate * to.has(layer * kExperts + b);
            }
            row[static_cast<size_t>(b)] +=
                estimate / static_cast<double>(history.back().experts.size());
        }
    }
    return row;
}

// Decode parts of finished requests, the nearest three by cosine over the pass so far.
Row eam(const History& history, int layer) {
    using Matrix = std::map<int, double>;
    std::vector<Matrix> finished;
    Matrix request, pass;
    for (const Seen& step : history) {
        if (step.new_sequence) {
            if (!request.empty()) finished.push_back(request);
            request.clear();
        }
        if (step.prefill) continue;
        if (step.layer == 0) pass.clear();
        for (size_t i = 0; i < step.experts.size(); ++i) {
            request[step.experts[i]] += step.counts[i];
            pass[step.experts[i]] += step.counts[i];
        }
    }
    const int now = history.back().layer;
    std::vector<std::pair<double, size_t>> near;
    for (size_t i = 0; i < finished.size(); ++i) {
        double product = 0, square = 0;
        for (const auto& [expert, count] : finished[i]) {
            if (expert / kExperts > now) continue;
            square += count * count;
            if (pass.contains(expert)) product += count * pass[expert];
        }
        if (product > 0) near.emplace_back(-product / std::sqrt(square), i);
    }
    std::ranges::sort(near);
    // As near as each other: which of the two counts is up to the last bits of floats.
    if (near.size() > 3 && near[3].first - near[2].first < 1e-6) return {};
    if (near.size() > 3) near.resize(3);
    Row row(kExperts);
    for (int e = 0; e < kExperts; ++e) {
        for (const auto& one : near) row[size_t(e)] += finished[one.second][layer * kExperts + e];
        if (near.empty()) row[size_t(e)] += request[layer * kExperts + e];
    }
    double sum = 0;
    for (const double value : row) sum += value;
    for (double& value : row) {
        value = sum > 0 ? value / sum : 1.0 / kExperts;
        value = std::min(1.0, value * static_cast<double>(history.back().experts.size())) *
                (1.0 - static_cast<double>(layer - now) / kLayers);
    }
    return row;
}

void check(const std::string& name, uint64_t seed) {
    auto predictor = make_predictor(name, {kLayers, kExperts});
    CHECK_EQ(std::string(predictor->name()), name);
    std::mt19937_64 random(seed);
    const auto draw = [&](int below) { return static_cast<int>(random() % unsigned(below)); };
    History history;
    int compared = 0;
    for (int sequence = 0; sequence < 6; ++sequence) {
        for (int token = 0; token < 7; ++token) {
            for (int layer = 0; layer < kLayers; ++layer) {
                Seen step{layer, {}, {}, token == 0, token == 0 && layer == 0};
                std::set<int32_t> chosen;
                while (chosen.size() < size_t(step.prefill ? 5 : 2 + sequence % 2)) {
                    chosen.insert(layer * kExperts + std::min(draw(kExperts), draw(kExperts)));
                }
                for (const int32_t expert : chosen) {
                    step.experts.push_back(expert);
                    step.counts.push_back(step.prefill ? 1 + draw(9) : 1);
                }
                history.push_back(step);
                const FlatExperts experts(step.experts);
                predictor->observe({.index = int64_t(history.size()) - 1,
                                    .layer = LayerId{layer},
                                    .experts = experts,
                                    .counts = step.counts,
                                    .router = {},
                                    .prefill = step.prefill,
                                    .new_sequence = step.new_sequence});
                if (step.prefill) continue;
                for (int ahead = 1; ahead <= std::min(predictor->reach(), kLayers); ++ahead) {
                    const int target = (layer + ahead) % kLayers;
                    std::vector<float> scores(kExperts, -1.0f);
                    const bool known = predictor->predict(LayerId{target}, scores);
                    CHECK_EQ(known, name != "eam" || target > layer);
                    if (!known) continue;
                    const Row expected = name == "previous"     ? previous(history, target)
                                         : name == "transition" ? transition(history, target)
                                                                : eam(history, target);
                    if (expected.empty()) continue;
                    for (size_t e = 0; e < kExperts; ++e) {
                        CHECK(std::abs(scores[e] - expected[e]) < 1e-4);
                        CHECK(scores[e] >= 0.0f && scores[e] <= 1.0001f);
                    }
                    ++compared;
                }
            }
        }
    }
    CHECK(compared > 100);
}

TEST("every predictor is as defined") {
    for (const std::string& name : predictor_names()) check(name, drawn_seed());
}

TEST("an unknown name is refused with those that exist") {
    try {
        (void)make_predictor("psychic", {1, 1});
        CHECK(false);
    } catch (const Error& error) {
        CHECK(std::string(error.what()).find("previous, transition, eam") != std::string::npos);
    }
}

}  // namespace

int main(int argc, char** argv) {
    return run_tests(argc, argv);
}
