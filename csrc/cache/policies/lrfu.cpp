// Decayed frequency with layer distance: evicts the minimum of EMA(0.95 per token) * (1 - 0.5 *
// layers_until_next_visit / L), ties by lower flat id. A token is a forward pass: it begins where
// the layer does not rise or a sequence starts. Each step that uses an expert counts once, however
// many tokens it routes there.
#include "cache/policies/decayed_frequency.h"
#include "cache/policies/policies.h"
#include "cache/policies/select.h"

namespace moeinf {
namespace {

class Lrfu final : public Policy {
public:
    explicit Lrfu(PolicyShape shape)
        : shape_(shape),
          weights_(static_cast<size_t>(shape.total())),
          layer_of_(static_cast<size_t>(shape.total())),
          nearness_(static_cast<size_t>(shape.num_layers)) {
        for (size_t i = 0; i < layer_of_.size(); ++i) {
            layer_of_[i] = static_cast<int32_t>(i) / shape.num_experts;
        }
        visit(shape.num_layers - 1);  // before the first step every layer is still to come
    }

    std::string_view name() const noexcept override { return "lrfu"; }

    void observe(const Step& step) override {
        if (step.new_sequence || step.layer <= layer_) {
            decayed_frequency::start_token(weights_.data(), weights_.size(), unit_);
        }
        if (step.layer != layer_) visit(step.layer);
        for (const int32_t expert : step.experts) weights_[static_cast<size_t>(expert)] += unit_;
    }

    size_t choose_victims(std::span<const int32_t> residents, std::span<const uint32_t> pinned,
                          std::span<int32_t> victims) override {
        return select_lowest(residents, pinned, victims, [this](int32_t expert) {
            const auto e = static_cast<size_t>(expert);
            const double nearness = nearness_[static_cast<size_t>(layer_of_[e])];
            return Key{decayed_frequency::score(weights_[e], nearness), expert};
        });
    }

private:
    struct Key {
        double score;
        int32_t expert;
        bool operator<(const Key& other) const {
            return score < other.score || (score == other.score && expert < other.expert);
        }
    };

    void visit(int32_t layer) {
        layer_ = layer;
        for (int32_t l = 0; l < shape_.num_layers; ++l) {
            nearness_[static_cast<size_t>(l)] =
                decayed_frequency::nearness(l, layer, shape_.num_layers);
        }
    }

    PolicyShape shape_;
    std::vector<double> weights_;    // by flat expert, see decayed_frequency.h
    std::vector<int32_t> layer_of_;  // by flat expert
    std::vector<double> nearness_;   // by layer, seen from layer_
    double unit_ = 1.0;
    int32_t layer_ = 0;  // of the latest step
};

}  // namespace

std::unique_ptr<Policy> make_lrfu(PolicyShape shape) {
    return std::make_unique<Lrfu>(shape);
}

}  // namespace moeinf
