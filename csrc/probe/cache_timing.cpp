#include "probe/cache_timing.h"

#include <chrono>
#include <random>

#include "policy/residency.h"

namespace moeinf {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

std::vector<double> time_cache_hits(ExpertCache& cache, LayerId layer,
                                    const std::vector<ExpertIndex>& experts, int32_t rounds,
                                    int32_t steps_per_round) {
    std::vector<double> means;
    std::vector<ReadyExpert> ready;
    for (int32_t round = 0; round < rounds; ++round) {
        const auto start = Clock::now();
        for (int32_t i = 0; i < steps_per_round; ++i) {
            StepLease step = cache.begin_step({.layer = layer, .experts = experts});
            ready.clear();
            while (step.wait_ready(ready)) continue;
            for (const ReadyExpert& one : ready) step.release(one.position);
        }
        means.push_back(seconds_since(start) / steps_per_round);
    }
    return means;
}

std::vector<double> time_cache_misses(const std::string& policy, int32_t num_layers,
                                      int32_t num_experts, int32_t slots, int32_t misses,
                                      int32_t rounds, int32_t steps_per_round) {
    const ModelShape shape{num_layers, num_experts};
    Residency residency(shape, slots, make_policy(policy, shape));
    std::mt19937 random(1);
    StepPlan plan;
    std::vector<ExpertId> experts;
    const std::vector<int32_t> counts(static_cast<size_t>(misses), 1);
    std::vector<double> means;
    int64_t index = 0;
    for (int32_t round = -1; round < rounds; ++round) {  // the first only fills the slots
        Clock::duration spent{};
        for (int32_t i = 0; i < steps_per_round; ++i) {
            const auto layer = LayerId(index % num_layers);
            experts.clear();
            const auto first = static_cast<int32_t>(random() % static_cast<uint32_t>(num_experts));
            for (int32_t e = 0; e < num_experts && experts.size() < counts.size(); ++e) {
                const ExpertId expert = shape.id(layer, ExpertIndex{(first + e) % num_experts});
                if (!residency.resident(expert)) experts.push_back(expert);
            }
            const auto start = Clock::now();
            residency.plan({.index = index++,
                            .layer = layer,
                            .experts = experts,
                            .counts = counts,
                            .router = {}},
                           plan);
            spent += Clock::now() - start;
        }
        if (round >= 0)
            means.push_back(std::chrono::duration<double>(spent).count() / steps_per_round);
    }
    return means;
}

}  // namespace moeinf
