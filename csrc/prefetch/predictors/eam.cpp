// The paper's prediction (MoE-Infinity, arXiv 2401.14361v3, section 5.1): the entries of the
// collection nearest to the pass so far, summed, rows normalised, and row i scaled by
// (1 - (i - l) / L), l the current layer.
//
// Open choices are made as in the policy `eam` (eam_follower.h). A normalised row is a share of all
// uses. Multiplied by the experts of a step it is the probability of each expert, up to 1. The
// paper orders all later layers. Here a prediction covers the next kReach layers, because idle link
// time carries only a few experts.
#include <algorithm>
#include <utility>

#include "policy/eam_follower.h"
#include "prefetch/predictor.h"

namespace moeinf {
namespace {

constexpr int32_t kReach = 4;

class EamPredictor final : public Predictor {
public:
    explicit EamPredictor(Eamc from) : shape_(from.decode.shape()), follower_(std::move(from)) {}

    std::string_view name() const noexcept override { return "eam"; }

    void observe(const Step& step) override {
        follower_.observe(step);
        layer_ = step.layer;
        experts_ = static_cast<float>(step.experts.size());
    }

    [[nodiscard]] int32_t reach() const noexcept override { return kReach; }

    bool predict(LayerId layer, std::span<float> scores) override {
        if (layer <= layer_ || !follower_.predict(layer, scores)) return false;
        const float nearness = 1.0f - static_cast<float>(number(layer) - number(layer_)) /
                                          static_cast<float>(shape_.num_layers);
        for (float& score : scores) score = std::min(1.0f, score * experts_) * nearness;
        return true;
    }

    std::unique_ptr<Collection> collection() const override {
        return std::make_unique<Eamc>(follower_.collections());
    }

private:
    ModelShape shape_;
    EamFollower follower_;
    LayerId layer_ = LayerId::kNone;  // of the latest step
    float experts_ = 0.0f;            // of the latest step
};

}  // namespace

std::unique_ptr<Predictor> make_eam_predictor(ModelShape shape, const Collection* from) {
    const auto* eamc = dynamic_cast<const Eamc*>(from);
    return std::make_unique<EamPredictor>(eamc != nullptr ? *eamc : Eamc(shape));
}

}  // namespace moeinf
