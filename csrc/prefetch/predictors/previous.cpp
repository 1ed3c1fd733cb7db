// Previous token: predicts that a layer uses the experts of earlier tokens again. The score is an
// average of uses that halves with every visit of the layer. For a prompt, a use is an expert's
// count divided by the count of the layer's most used expert.
#include <algorithm>

#include "prefetch/predictor.h"

namespace moeinf {
namespace {

constexpr float kKeep = 0.5f;

class Previous final : public Predictor {
public:
    explicit Previous(ModelShape shape) : shape_(shape), uses_(shape.total()) {}

    std::string_view name() const noexcept override { return "previous"; }

    void observe(const Step& step) override {
        for (float& use : row(step.layer)) use *= kKeep;
        float most = 1.0f;
        if (step.prefill) {
            for (const int32_t count : step.counts) most = std::max(most, float(count));
        }
        for (size_t i = 0; i < step.experts.size(); ++i) {
            const float use = step.prefill && !step.counts.empty() ? float(step.counts[i]) : most;
            uses_[step.experts[i]] += (1.0f - kKeep) * use / most;
        }
    }

    bool predict(LayerId layer, std::span<float> scores) override {
        std::ranges::copy(row(layer), scores.begin());
        return true;
    }

private:
    std::span<float> row(LayerId layer) {
        return {uses_.data() + shape_.begin_of(layer), static_cast<size_t>(shape_.num_experts)};
    }

    ModelShape shape_;
    PerExpert<float> uses_;
};

}  // namespace

std::unique_ptr<Predictor> make_previous_predictor(ModelShape shape, const Collection* /*from*/) {
    return std::make_unique<Previous>(shape);
}

}  // namespace moeinf
