// Least frequently used. Counts the steps that used an expert since the beginning, kept across
// evictions; the lowest count leaves first, then the older last use, then the lower flat id.
#include <compare>

#include "policy/policies/expert_heaps.h"
#include "policy/policies/policies.h"

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
        int32_t expert;
        auto operator<=>(const Key&) const = default;
    };

    Key key(int32_t /*group*/, int32_t expert) const {
        const Uses& of = uses[static_cast<size_t>(expert)];
        return {of.count, of.last, expert};
    }
    bool before(int32_t a, int32_t b) const { return key(0, a) < key(0, b); }

    std::vector<Uses> uses;  // by flat expert
};

class Lfu final : public Policy {
public:
    explicit Lfu(PolicyShape shape)
        : order_{std::vector<Uses>(static_cast<size_t>(shape.total()))},
          residents_(1, shape.total(), order_) {}

    std::string_view name() const noexcept override { return "lfu"; }

    void observe(const Step& step) override {
        for (const int32_t expert : step.experts) {
            Uses& uses = order_.uses[static_cast<size_t>(expert)];
            ++uses.count;
            uses.last = step.index;
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
    Order order_;
    ExpertHeaps<Order> residents_;
};

}  // namespace

std::unique_ptr<Policy> make_lfu(PolicyShape shape) {
    return std::make_unique<Lfu>(shape);
}

}  // namespace moeinf
