#include "policy/prompt_shares.h"

#include <algorithm>
#include <numeric>

namespace moeinf {
namespace {

// One frame in so many belongs to no layer.
constexpr int32_t kPassing = 8;

}  // namespace

PromptShares::PromptShares(ModelShape shape)
    : shape_(shape), kept_(shape.total()), beyond_(shape.num_layers) {}

void PromptShares::begin(const Step& step, int32_t frames) {
    in_progress_ = true;
    share_ = std::max(1, (frames - frames / kPassing) / shape_.num_layers);
    for (const ExpertId expert : shape_.experts_of(step.layer)) kept_[expert] = 0;
    by_use_.resize(step.experts.size());
    std::iota(by_use_.begin(), by_use_.end(), size_t{0});
    std::ranges::stable_sort(by_use_, [&](size_t a, size_t b) {
        if (step.recent[a] != step.recent[b]) return step.recent[a] > step.recent[b];
        return step.counts[a] > step.counts[b];
    });
    ordered_.clear();
    for (const size_t i : by_use_) {
        if (ordered_.size() == static_cast<size_t>(share_)) break;
        kept_[step.experts[i]] = 1;
        ordered_.push_back(step.experts[i]);
    }
    for (const ExpertId expert : step.experts) {
        if (!keeps(expert)) ordered_.push_back(expert);
    }
}

void PromptShares::end() noexcept {
    if (!in_progress_) return;
    in_progress_ = false;
    std::ranges::fill(kept_, uint8_t{0});
}

size_t PromptShares::choose_victims(Policy& policy, std::span<const ExpertId> residents,
                                    const Pins& pins, std::span<const ExpertId> missing,
                                    std::span<ExpertId> victims) {
    std::ranges::fill(beyond_, -share_);
    for (const ExpertId expert : residents) {
        if (is_some(expert)) ++beyond_[shape_.layer_of(expert)];
    }
    for (const ExpertId expert : missing) {
        if (keeps(expert)) ++beyond_[shape_.layer_of(expert)];
    }
    spared_ = pins;
    evictable_.clear();
    for (const ExpertId expert : residents) {
        if (!is_some(expert) || pins[expert] != 0) continue;
        if (keeps(expert) || beyond_[shape_.layer_of(expert)] <= 0) {
            ++spared_[expert];
        } else {
            evictable_.push_back(expert);
        }
    }
    evictable_.resize(policy.choose_victims(residents, spared_, evictable_));
    size_t found = 0;
    for (const ExpertId expert : evictable_) {
        if (found == victims.size()) break;
        if (beyond_[shape_.layer_of(expert)]-- > 0) victims[found++] = expert;
    }
    return found;
}

}  // namespace moeinf
