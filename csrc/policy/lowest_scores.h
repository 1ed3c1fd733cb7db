// For policies that compute the scores of all residents at each eviction.
#pragma once

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "policy/policy.h"

namespace moeinf {

template <class Score>
using ScoredExperts = std::vector<std::pair<Score, ExpertId>>;

// Fills `victims` with the unpinned residents of the lowest scores, ties by the lower flat id, and
// returns their number. Computes scores in the order of `residents`.
template <class Score, class ScoreOf>
size_t lowest_scores(std::span<const ExpertId> residents, const Pins& pins, const ScoreOf& score_of,
                     ScoredExperts<Score>& scratch, std::span<ExpertId> victims) {
    scratch.clear();
    for (const ExpertId expert : residents) {
        if (!is_some(expert) || pins[expert] != 0) continue;
        scratch.emplace_back(score_of(expert), expert);
    }
    const size_t found = std::min(victims.size(), scratch.size());
    std::partial_sort(scratch.begin(), scratch.begin() + static_cast<std::ptrdiff_t>(found),
                      scratch.end());
    for (size_t i = 0; i < found; ++i) victims[i] = scratch[i].second;
    return found;
}

}  // namespace moeinf
