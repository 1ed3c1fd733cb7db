// Frequency classes with a recency list each, the policy llama.cpp ships since October 2026.
// An expert's class is that of its use count: 0 for counts 0 and 1, then one more per doubling, at
// most 7. Counts halve every 128 tokens (`tokens_per_halving`) and survive eviction. Every class
// lists its residents by last use, and the victim is the head with the largest age / 2^class; ties
// go to the lower flat id. The description leaves some choices open. Here a step counts once for
// each of its experts, for any number of tokens; a forward pass counts as one token; ages are in
// steps; and halving moves experts to their new classes at once.
#include <algorithm>
#include <array>
#include <bit>
#include <utility>

#include "policy/per_caller.h"
#include "policy/policies/recency_lists.h"
#include "policy/policies/row.h"

namespace moeinf {
namespace {

constexpr int32_t kClasses = 8;

class ClassLru final : public Policy {
public:
    ClassLru(ModelShape shape, std::span<const double> values)
        : shape_(shape),
          tokens_per_halving_(static_cast<int64_t>(values[0])),
          counts_(shape.total()),
          residents_(shape.total(), kClasses) {}

    std::string_view name() const noexcept override { return "classlru"; }

    void observe(const Step& step) override {
        if (starts_.at(step)) start_token();
        now_ = step.index;
        for (const ExpertId expert : step.experts) {
            ++counts_[expert];
            if (!residents_.contains(expert)) continue;  // inserted() will add it
            residents_.remove(expert);
            add(expert, now_);
        }
    }

    size_t choose_victims(std::span<const ExpertId> /*residents*/, const Pins& pins,
                          std::span<ExpertId> victims) override {
        const auto unpinned = [&](ExpertId expert) {
            while (is_some(expert) && pins[expert] != 0) expert = residents_.newer(expert);
            return expert;
        };
        struct Head {
            ExpertId expert;
            int64_t age;  // times 2^(kClasses - 1 - class): compared without division
        };
        std::array<Head, kClasses> heads;
        const auto set_head = [&](int32_t list, ExpertId from) {
            const ExpertId expert = unpinned(from);
            const int64_t age = is_some(expert) ? now_ - residents_.last_use(expert) : -1;
            heads[static_cast<size_t>(list)] = {expert, age << (kClasses - 1 - list)};
        };
        for (int32_t list = 0; list < kClasses; ++list) set_head(list, residents_.oldest(list));
        size_t found = 0;
        for (; found < victims.size(); ++found) {
            // A list without a head has a negative age.
            const auto oldest = std::ranges::min_element(heads, [](const Head& a, const Head& b) {
                return a.age > b.age || (a.age == b.age && a.expert < b.expert);
            });
            if (!is_some(oldest->expert)) break;
            victims[found] = oldest->expert;
            set_head(static_cast<int32_t>(oldest - heads.begin()),
                     residents_.newer(oldest->expert));
        }
        return found;
    }

    // One that a prefetch brings in counts as used by the latest step.
    void inserted(ExpertId expert) override { add(expert, now_); }
    void evicted(ExpertId expert) override { residents_.remove(expert); }

private:
    void add(ExpertId expert, int64_t last_use) {
        const uint32_t count = std::max(1u, counts_[expert]);
        const int32_t list = std::min(static_cast<int32_t>(std::bit_width(count)), kClasses) - 1;
        residents_.add(expert, list, last_use);
    }

    void start_token() {
        ++tokens_;
        if (tokens_ == 0 || tokens_ % tokens_per_halving_ != 0) return;
        by_age_.clear();
        for (const ExpertId expert : shape_.experts()) {
            if (!residents_.contains(expert)) continue;
            by_age_.emplace_back(residents_.last_use(expert), expert);
            residents_.remove(expert);
        }
        for (uint32_t& count : counts_) count /= 2;
        std::sort(by_age_.begin(), by_age_.end());
        for (const auto& [last_use, expert] : by_age_) add(expert, last_use);
    }

    ModelShape shape_;
    int64_t tokens_per_halving_;
    PerExpert<uint32_t> counts_;
    RecencyLists residents_;  // one list per class
    int64_t now_ = 0;
    int64_t tokens_ = -1;  // index of the current one
    PassStarts starts_;
    std::vector<std::pair<int64_t, ExpertId>> by_age_;  // scratch
};

}  // namespace

constexpr PolicyParameter kParameters[] = {{"tokens_per_halving", 128, 1, 1e9}};

namespace policies {
extern const PolicyRow classlru = policy_with<ClassLru>("classlru", kParameters);
}  // namespace policies

}  // namespace moeinf
