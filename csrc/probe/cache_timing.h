// Times what the cache itself costs, without Python and without bytes that move.
// benchmarks/cache_overhead.py holds the result against its limits.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cache/expert_cache.h"

namespace moeinf {

// Mean seconds of a step whose experts are all resident, from begin_step() to the last release. One
// value for each round.
[[nodiscard]] std::vector<double> time_cache_hits(ExpertCache& cache, LayerId layer,
                                                  const std::vector<ExpertIndex>& experts,
                                                  int32_t rounds, int32_t steps_per_round);

// Mean seconds to plan a step whose `misses` experts are all absent, with `slots` residents. One
// value for each round.
[[nodiscard]] std::vector<double> time_cache_misses(const std::string& policy, int32_t num_layers,
                                                    int32_t num_experts, int32_t slots,
                                                    int32_t misses, int32_t rounds,
                                                    int32_t steps_per_round);

}  // namespace moeinf
