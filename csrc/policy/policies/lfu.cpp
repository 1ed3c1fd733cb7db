// Least frequently used. Counts the steps that used an expert since the beginning, kept across
// evictions; it evicts the lowest count, then the older last use, then the lower flat id.
#include <compare>

#include "policy/policies/expert_heaps.h"
#include "policy/policies/row.h"

namespace moeinf {
namespace {

struct Uses {
    int64_t count = 0;
    int64_t last = -1;  // step index
};

struct Order {
    struct Key {
        int64_t count;
        int64_t last;
        ExpertId expert;
        auto operator<=>(const Key&) const = default;
    };

    Key key(int32_t /*group*/, ExpertId expert) const {
        return {uses[expert].count, uses[expert].last, expert};
    }
    bool before(ExpertId a, ExpertId b) const { return key(0, a) < key(0, b); }

    PerExpert<Uses> uses;
};

class Lfu final : public OrderedPolicy<Order> {
public:
    explicit Lfu(ModelShape shape)
        : OrderedPolicy(1, shape.total(), {PerExpert<Uses>(shape.total())}) {}

    std::string_view name() const noexcept override { return "lfu"; }

    void observe(const Step& step) override {
        for (const ExpertId expert : step.experts) {
            Uses& uses = order_.uses[expert];
            ++uses.count;
            uses.last = step.index;
            residents_.raised(expert);
        }
    }
};

}  // namespace

namespace policies {
extern const PolicyRow lfu = plain_policy<Lfu>("lfu");
}  // namespace policies

}  // namespace moeinf
