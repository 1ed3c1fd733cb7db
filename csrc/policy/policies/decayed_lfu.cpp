// Decayed frequency with layer distance. Evicts the minimum of
//
//   EMA * (1 - layer_weight * d / L),   EMA <- keep * EMA + (1 if used) per token
//
// d is the number of layers that are computed before the expert's layer comes again, and L the
// number of layers. Ties go to the lower flat id. A token is a forward pass: it begins where the
// layer does not rise or where a sequence starts. A step that uses an expert counts once, for any
// number of tokens.
//
// The averages are not decayed at every token. Instead later uses count more: `unit` grows by 1 /
// keep per token, and each use adds `unit` to the weight, so weight / unit is the EMA. Scores are
// only compared, so the division is left out.
#include "policy/per_caller.h"
#include "policy/policies/expert_heaps.h"
#include "policy/policies/row.h"

namespace moeinf {
namespace {

// Scaling by a power of two is exact. With keep = 0.95 a weight that nothing adds to reaches
// zero after some 14,000 tokens.
constexpr double kRescaleAbove = 0x1p64;
constexpr double kRescaleBy = 0x1p-64;

class DecayedLfu final : public OrderedPolicy<ScaledOrder<double>> {
public:
    DecayedLfu(ModelShape shape, std::span<const double> values)
        : OrderedPolicy(shape.num_layers, shape.num_experts, ScaledOrder<double>(shape)),
          shape_(shape),
          growth_per_token_(1.0 / values[0]),
          layer_weight_(values[1]) {
        visit(LayerId{shape.num_layers - 1});  // before the first step every layer is to come
    }

    std::string_view name() const noexcept override { return "decayed_lfu"; }

    void observe(const Step& step) override {
        if (starts_.at(step)) start_token();
        if (step.layer != layer_) visit(step.layer);
        for (const ExpertId expert : step.experts) {
            order_.values[expert] += unit_;
            residents_.raised(expert);
        }
    }

private:
    void start_token() {
        unit_ *= growth_per_token_;
        if (unit_ <= kRescaleAbove) return;
        unit_ *= kRescaleBy;
        for (double& weight : order_.values) weight *= kRescaleBy;
        residents_.reordered();  // small weights may have become equal
    }

    // Sets the factors as seen from this layer. Its experts that are not used now wait for the
    // whole next token.
    void visit(LayerId current) {
        layer_ = current;
        for (const LayerId layer : shape_.layers()) {
            const int32_t ahead = number(layer) - number(current);
            const int32_t distance = ahead > 0 ? ahead : ahead + shape_.num_layers;
            order_.factors[layer] = 1.0 - layer_weight_ * distance / shape_.num_layers;
        }
    }

    ModelShape shape_;
    double growth_per_token_, layer_weight_;
    double unit_ = 1.0;
    LayerId layer_{0};  // of the latest step
    PassStarts starts_;
};

}  // namespace

constexpr PolicyParameter kParameters[] = {
    {"keep", 0.95, 0.01, 1},
    {"layer_weight", 0.5, 0, 1},
};

namespace policies {
extern const PolicyRow decayed_lfu = policy_with<DecayedLfu>("decayed_lfu", kParameters);
}  // namespace policies

}  // namespace moeinf
