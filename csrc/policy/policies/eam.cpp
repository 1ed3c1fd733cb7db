// The paper's policy (MoE-Infinity, arXiv 2401.14361v3, section 5.2): evicts the minimum of
// (p + eps) * (1 - l / L) / row sum, where p is the predicted activation of an expert of layer l.
// This favours early layers, which prefetching covers worst.
//
// Ties go to the lower flat id. eam_follower.h describes the prediction.
#include <utility>

#include "policy/eam_follower.h"
#include "policy/lowest_scores.h"
#include "policy/policies/row.h"

namespace moeinf {
namespace {

constexpr float kEpsilon = 1e-6f;

class Eam final : public Policy {
public:
    Eam(Eamc from, int32_t matched)
        : shape_(from.decode.shape()),
          follower_(std::move(from), matched),
          predicted_(static_cast<size_t>(shape_.total())),
          scores_(shape_.total()) {}

    std::string_view name() const noexcept override { return "eam"; }

    void observe(const Step& step) override {
        follower_.observe(step);
        const auto& phase = follower_.current();
        stale_ = stale_ || phase.nearest != matched_ || &phase != scored_ || matched_.empty();
    }

    size_t choose_victims(std::span<const ExpertId> residents, const Pins& pins,
                          std::span<ExpertId> victims) override {
        if (stale_) score();
        const auto score_of = [this](ExpertId expert) { return scores_[expert]; };
        return lowest_scores(residents, pins, score_of, candidates_, victims);
    }

    std::unique_ptr<Collection> collection() const override {
        return std::make_unique<Eamc>(follower_.collections());
    }

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
        for (const LayerId layer : shape_.layers()) {
            const float favour =
                1.0f - static_cast<float>(number(layer)) / static_cast<float>(shape_.num_layers);
            for (const ExpertId expert : shape_.experts_of(layer)) {
                scores_[expert] = (predicted_[index(expert)] + kEpsilon) * favour;
            }
        }
        stale_ = false;
    }

    ModelShape shape_;
    EamFollower follower_;
    const EamFollower::Phase* scored_ = nullptr;  // what predicted_ and scores_ were made from
    std::vector<int32_t> matched_;
    bool stale_ = true;
    std::vector<float> predicted_;  // by flat expert
    PerExpert<float> scores_;
    ScoredExperts<float> candidates_;  // scratch
};

}  // namespace

constexpr PolicyParameter kParameters[] = {{"matched", EamFollower::kMatched, 1, 1000}};

namespace policies {
extern const PolicyRow eam{
    "eam", kParameters, true,
    [](ModelShape shape, std::span<const double> values, const Collection* from) {
        const auto* eamc = dynamic_cast<const Eamc*>(from);
        return std::unique_ptr<Policy>(std::make_unique<Eam>(eamc != nullptr ? *eamc : Eamc(shape),
                                                             static_cast<int32_t>(values[0])));
    }};
}  // namespace policies

}  // namespace moeinf
