// Layer-to-layer transitions, learned online. For each expert a of a layer it keeps how often each
// expert b of the next layer was used after a: a plain average at first, an exponential one later.
// The score of b is the mean over the experts of the latest step. The first layer of the next token
// follows the last layer.
#include <algorithm>

#include "policy/per_caller.h"
#include "prefetch/predictor.h"

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
        caller_ = &callers_.of(step.caller);
        const bool usable = !step.prefill && step.experts.size() <= kMaxSet;
        if (usable && !step.new_sequence && follows(step.layer)) learn(step);
        caller_->latest.clear();
        caller_->layer = step.layer;
        if (usable) caller_->latest.assign(step.experts.begin(), step.experts.end());
    }

    bool predict(LayerId layer, std::span<float> scores) override {
        if (caller_ == nullptr || !follows(layer)) return false;
        std::ranges::fill(scores, 0.0f);
        for (const ExpertId expert : caller_->latest) {
            const float* next = row(expert);
            for (size_t b = 0; b < scores.size(); ++b) scores[b] += next[b];
        }
        const float share = 1.0f / static_cast<float>(caller_->latest.size());
        for (float& score : scores) score *= share;
        return true;
    }

private:
    float* row(ExpertId expert) {
        return used_next_.data() + index(expert) * static_cast<size_t>(shape_.num_experts);
    }

    [[nodiscard]] bool follows(LayerId layer) const {
        return !caller_->latest.empty() && layer == shape_.after(caller_->layer, 1);
    }

    void learn(const Step& step) {
        const size_t first = shape_.begin_of(step.layer);
        for (const ExpertId expert : caller_->latest) {
            float& uses = uses_[expert];
            uses += 1.0f;
            // As if it had once been seen before with nothing after it.
            const float rate = std::max(kSlowestRate, 1.0f / (uses + 1.0f));
            float* next = row(expert);
            for (int32_t b = 0; b < shape_.num_experts; ++b) next[b] *= 1.0f - rate;
            for (const ExpertId used : step.experts) next[index(used) - first] += rate;
        }
    }

    struct Caller {
        LayerId layer = LayerId::kNone;  // of the latest step
        std::vector<ExpertId> latest;    // its experts, if it says anything
    };

    ModelShape shape_;
    PerCaller<Caller> callers_;
    Caller* caller_ = nullptr;      // of the latest step
    PerExpert<float> uses_;         // steps that each has learned from
    std::vector<float> used_next_;  // [flat expert, expert of the next layer]
};

}  // namespace

std::unique_ptr<Predictor> make_transition_predictor(ModelShape shape, const Collection* /*from*/) {
    return std::make_unique<Transition>(shape);
}

}  // namespace moeinf
