// Layer-to-layer transitions, learned online. For each expert a of a layer it keeps how often each
// expert b of the next layer was used after a: a plain average at first, an exponential one later.
// The score of b is the mean over the experts of the latest step. The first layer of the next token
// follows the last layer.
#include <algorithm>

#include "prefetch/predictors/predictors.h"

namespace moeinf {
namespace {

constexpr float kSlowestRate = 0.02f;
constexpr size_t kMaxSet = 32;  // a larger set predicts little, and prompts are large

class Transition final : public Predictor {
public:
    explicit Transition(ModelShape shape)
        : shape_(shape),
          uses_(shape.total()),
          used_next_(uses_.size() * static_cast<size_t>(shape.num_experts)) {}

    std::string_view name() const noexcept override { return "transition"; }

    void observe(const Step& step) override {
        const bool usable = !step.prefill && step.experts.size() <= kMaxSet;
        if (usable && !step.new_sequence && follows(step.layer)) learn(step);
        latest_.clear();
        layer_ = step.layer;
        if (usable) latest_.assign(step.experts.begin(), step.experts.end());
    }

    bool predict(LayerId layer, std::span<float> scores) override {
        if (!follows(layer)) return false;
        std::ranges::fill(scores, 0.0f);
        for (const ExpertId expert : latest_) {
            const float* next = row(expert);
            for (size_t b = 0; b < scores.size(); ++b) scores[b] += next[b];
        }
        const float share = 1.0f / static_cast<float>(latest_.size());
        for (float& score : scores) score *= share;
        return true;
    }

private:
    float* row(ExpertId expert) {
        return used_next_.data() + index(expert) * static_cast<size_t>(shape_.num_experts);
    }

    [[nodiscard]] bool follows(LayerId layer) const {
        return !latest_.empty() && layer == shape_.after(layer_, 1);
    }

    void learn(const Step& step) {
        const size_t first = shape_.begin_of(step.layer);
        for (const ExpertId expert : latest_) {
            float& uses = uses_[expert];
            uses += 1.0f;
            // As if it had once been seen before with nothing after it.
            const float rate = std::max(kSlowestRate, 1.0f / (uses + 1.0f));
            float* next = row(expert);
            for (int32_t b = 0; b < shape_.num_experts; ++b) next[b] *= 1.0f - rate;
            for (const ExpertId used : step.experts) next[index(used) - first] += rate;
        }
    }

    ModelShape shape_;
    LayerId layer_ = LayerId::kNone;  // of the latest step
    std::vector<ExpertId> latest_;    // its experts, if it says anything
    PerExpert<float> uses_;           // steps that each has learned from
    std::vector<float> used_next_;    // [flat expert, expert of the next layer]
};

}  // namespace

std::unique_ptr<Predictor> make_transition_predictor(ModelShape shape, const Collection* /*from*/) {
    return std::make_unique<Transition>(shape);
}

}  // namespace moeinf
