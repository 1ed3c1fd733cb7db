#include "compute/top_k.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "compute/bf16.h"
#include "compute/row_sum.h"

namespace moeinf {
namespace {

using Choice = std::pair<float, int64_t>;

// Up to this share of all, torch sorts the first ones only.
constexpr int64_t kFewOf = 64;

bool before(const Choice& one, const Choice& other) {
    return (std::isnan(one.first) && !std::isnan(other.first)) || one.first > other.first;
}

void choose(std::vector<Choice>& choices, int64_t top_k) {
    const auto end = choices.begin() + top_k;
    if (top_k * kFewOf <= static_cast<int64_t>(choices.size())) {
        std::partial_sort(choices.begin(), end, choices.end(), before);
    } else {
        std::nth_element(choices.begin(), end - 1, choices.end(), before);
        std::sort(choices.begin(), end - 1, before);
    }
}

}  // namespace

void top_k(const TopKCall& call) {
    std::vector<Choice> choices(static_cast<size_t>(call.experts));
    std::vector<float> weights(static_cast<size_t>(call.top_k));
    for (int64_t token = 0; token < call.tokens; ++token) {
        const float* from = call.probabilities + token * call.experts;
        for (int64_t e = 0; e < call.experts; ++e) choices[static_cast<size_t>(e)] = {from[e], e};
        choose(choices, call.top_k);
        for (size_t k = 0; k < weights.size(); ++k) weights[k] = choices[k].first;
        const float sum = call.share_out ? row_sum(weights.data(), call.top_k) : 1.0f;
        for (int64_t k = 0; k < call.top_k; ++k) {
            const int64_t at = token * call.top_k + k;
            const float weight = weights[static_cast<size_t>(k)] / sum;
            if (call.dtype == DType::kBF16) {
                static_cast<BF16*>(call.weights)[at] = rounded(weight);
            } else {
                static_cast<float*>(call.weights)[at] = weight;
            }
            call.ids[at] = choices[static_cast<size_t>(k)].second;
        }
    }
}

}  // namespace moeinf
