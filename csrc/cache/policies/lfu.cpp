// Least frequently used. Counts the steps that used an expert since the beginning, kept across
// evictions; the lowest count leaves first, then the older last use, then the lower flat id.
#include <compare>

#include "cache/policies/policies.h"
#include "cache/policies/select.h"

namespace moeinf {
namespace {

class Lfu final : public Policy {
public:
    explicit Lfu(PolicyShape shape) : uses_(static_cast<size_t>(shape.total())) {}

    std::string_view name() const noexcept override { return "lfu"; }

    void observe(const Step& step) override {
        for (const int32_t expert : step.experts) {
            Uses& uses = uses_[static_cast<size_t>(expert)];
            ++uses.count;
            uses.last = step.index;
        }
    }

    size_t choose_victims(std::span<const int32_t> residents, std::span<const uint32_t> pinned,
                          std::span<int32_t> victims) override {
        return select_lowest(residents, pinned, victims, [this](int32_t expert) {
            const Uses& uses = uses_[static_cast<size_t>(expert)];
            return Key{uses.count, uses.last, expert};
        });
    }

private:
    struct Uses {
        int64_t count = 0;
        int64_t last = -1;  // step index
    };
    struct Key {
        int64_t count;
        int64_t last;
        int32_t expert;
        auto operator<=>(const Key&) const = default;
    };

    std::vector<Uses> uses_;  // by flat expert
};

}  // namespace

std::unique_ptr<Policy> make_lfu(PolicyShape shape) {
    return std::make_unique<Lfu>(shape);
}

}  // namespace moeinf
