// Decayed frequency with layer distance: evicts the minimum of EMA(0.95 per token) * (1 - 0.5 *
// layers_until_next_visit / L), ties by lower flat id. A token is a forward pass: it begins where
// the layer does not rise or a sequence starts. Each step that uses an expert counts once, however
// many tokens it routes there.
#include "policy/policies/decayed_frequency.h"
#include "policy/policies/expert_heaps.h"
#include "policy/policies/policies.h"

namespace moeinf {
namespace {

// Within a layer all scores share one factor, so a layer's order is that of its weights and changes
// only where an expert is used: one heap per layer.
struct Order {
    // Two unequal weights of a layer may round to one score; they keep their order.
    struct Key {
        double score;
        int32_t layer;
        double weight;
        int32_t expert;
        bool operator<(const Key& other) const {
            if (score < other.score) return true;
            if (score > other.score) return false;
            if (layer != other.layer) return layer < other.layer;
            if (weight != other.weight) return weight < other.weight;
            return expert < other.expert;
        }
    };

    explicit Order(PolicyShape of)
        : shape(of),
          weights(static_cast<size_t>(of.total())),
          nearness(static_cast<size_t>(of.num_layers)) {}

    Key key(int32_t layer, int32_t expert) const {
        const double weight = weights[static_cast<size_t>(expert)];
        return {decayed_frequency::score(weight, nearness[static_cast<size_t>(layer)]), layer,
                weight, expert};
    }
    bool before(int32_t a, int32_t b) const {
        const double weight_a = weights[static_cast<size_t>(a)];
        const double weight_b = weights[static_cast<size_t>(b)];
        return weight_a < weight_b || (weight_a == weight_b && a < b);
    }

    PolicyShape shape;
    std::vector<double> weights;   // by flat expert, see decayed_frequency.h
    std::vector<double> nearness;  // by layer, seen from that of the latest step
};

class Lrfu final : public Policy {
public:
    explicit Lrfu(PolicyShape shape)
        : order_(shape), residents_(shape.num_layers, shape.num_experts, order_) {
        visit(shape.num_layers - 1);  // before the first step every layer is still to come
    }

    std::string_view name() const noexcept override { return "lrfu"; }

    void observe(const Step& step) override {
        std::vector<double>& weights = order_.weights;
        if (step.new_sequence || step.layer <= layer_) {
            if (decayed_frequency::start_token(weights.data(), weights.size(), unit_)) {
                residents_.rebuild();  // small weights may have become equal
            }
        }
        if (step.layer != layer_) visit(step.layer);
        for (const int32_t expert : step.experts) {
            weights[static_cast<size_t>(expert)] += unit_;
            residents_.raised(expert);
        }
    }

    size_t choose_victims(std::span<const int32_t> /*residents*/, std::span<const uint32_t> pinned,
                          std::span<int32_t> victims) override {
        return residents_.lowest(pinned, victims);
    }

    void inserted(int32_t expert) override { residents_.add(expert); }
    void evicted(int32_t expert) override { residents_.remove(expert); }

private:
    void visit(int32_t layer) {
        layer_ = layer;
        const int32_t num_layers = order_.shape.num_layers;
        for (int32_t l = 0; l < num_layers; ++l) {
            order_.nearness[static_cast<size_t>(l)] =
                decayed_frequency::nearness(l, layer, num_layers);
        }
    }

    Order order_;
    ExpertHeaps<Order> residents_;
    double unit_ = 1.0;
    int32_t layer_ = 0;  // of the latest step
};

}  // namespace

std::unique_ptr<Policy> make_lrfu(PolicyShape shape) {
    return std::make_unique<Lrfu>(shape);
}

}  // namespace moeinf
