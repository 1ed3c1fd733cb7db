// The paper's policy (MoE-Infinity, arXiv 2401.14361v3, section 5.2): evicts the minimum of
// (p + eps) * (1 - l / L) / row sum, p the predicted activation of an expert of layer l, so that
// early layers, which prefetching covers worst, are favoured.
//
// Ties go to the lower flat id. How the prediction is made is said in eam_follower.h.
#include <algorithm>
#include <utility>

#include "policy/eam_follower.h"
#include "policy/policies/policies.h"

namespace moeinf {
namespace {

constexpr float kEpsilon = 1e-6f;

class Eam final : public Policy {
public:
    explicit Eam(Eamc from)
        : shape_(from.decode.shape()),
          follower_(std::move(from)),
          predicted_(static_cast<size_t>(shape_.total())),
          scores_(predicted_.size()) {}

    std::string_view name() const noexcept override { return "eam"; }

    void observe(const Step& step) override {
        follower_.observe(step);
        const auto& phase = follower_.current();
        stale_ = stale_ || phase.nearest != matched_ || &phase != scored_ || matched_.empty();
    }

    size_t choose_victims(std::span<const int32_t> residents, std::span<const uint32_t> pinned,
                          std::span<int32_t> victims) override {
        if (stale_) score();
        candidates_.clear();
        for (const int32_t expert : residents) {
            if (expert < 0 || pinned[static_cast<size_t>(expert)] != 0) continue;
            candidates_.emplace_back(scores_[static_cast<size_t>(expert)], expert);
        }
        const size_t found = std::min(victims.size(), candidates_.size());
        std::partial_sort(candidates_.begin(),
                          candidates_.begin() + static_cast<std::ptrdiff_t>(found),
                          candidates_.end());
        for (size_t i = 0; i < found; ++i) victims[i] = candidates_[i].second;
        return found;
    }

    const EamFollower* follower() const noexcept override { return &follower_; }

private:
    void score() {
        const EamFollower::Phase& phase = follower_.current();
        matched_ = phase.nearest;
        scored_ = &phase;
        if (matched_.empty()) {
            predicted_ = phase.request;
            normalise_rows(shape_, predicted_);
        } else {
            predict_activations(phase.collection, matched_, predicted_);
        }
        for (int32_t expert = 0; expert < shape_.total(); ++expert) {
            const float layer = static_cast<float>(expert / shape_.num_experts);
            scores_[static_cast<size_t>(expert)] =
                (predicted_[static_cast<size_t>(expert)] + kEpsilon) *
                (1.0f - layer / static_cast<float>(shape_.num_layers));
        }
        stale_ = false;
    }

    PolicyShape shape_;
    EamFollower follower_;
    const EamFollower::Phase* scored_ = nullptr;  // what predicted_ and scores_ were made from
    std::vector<int32_t> matched_;
    bool stale_ = true;
    std::vector<float> predicted_, scores_;              // by flat expert
    std::vector<std::pair<float, int32_t>> candidates_;  // scratch
};

}  // namespace

std::unique_ptr<Policy> make_eam(PolicyShape shape) {
    return make_eam(Eamc(shape));
}

std::unique_ptr<Policy> make_eam(Eamc from) {
    return std::make_unique<Eam>(std::move(from));
}

}  // namespace moeinf
