// Frequency classes with a recency list each, the policy llama.cpp ships since October 2026.
// An expert's class is that of its use count: 0 for counts 0 and 1, then one more per doubling, at
// most 7. Counts halve every 128 tokens and survive eviction. Every class lists its residents by
// last use, and the victim is the head with the largest age / 2^class; ties go to the lower flat
// id. Chosen where the description is silent: a step counts once for each of its experts however
// many tokens it routes there, a forward pass counts as one token, ages are in steps, and halving
// moves experts to their new classes at once.
#include <algorithm>
#include <array>
#include <bit>
#include <utility>

#include "policy/policies/policies.h"

namespace moeinf {
namespace {

constexpr int32_t kClasses = 8;
constexpr int32_t kTokensPerHalving = 128;

class ClassLru final : public Policy {
public:
    explicit ClassLru(PolicyShape shape)
        : ends_(shape.total()),
          counts_(static_cast<size_t>(shape.total()), 0),
          nodes_(static_cast<size_t>(shape.total() + kClasses)) {
        for (int32_t c = 0; c < kClasses; ++c) node(ends_ + c) = {ends_ + c, ends_ + c, -1};
    }

    std::string_view name() const noexcept override { return "classlru"; }

    void observe(const Step& step) override {
        if (step.new_sequence || step.layer <= layer_) start_token();
        layer_ = step.layer;
        now_ = step.index;
        for (const int32_t expert : step.experts) {
            ++counts_[static_cast<size_t>(expert)];
            if (node(expert).next < 0) continue;  // absent; inserted() will link it
            unlink(expert);
            link(expert);
        }
    }

    size_t choose_victims(std::span<const int32_t> /*residents*/, std::span<const uint32_t> pinned,
                          std::span<int32_t> victims) override {
        std::array<int32_t, kClasses> heads;
        for (int32_t c = 0; c < kClasses; ++c) heads[at(c)] = next_unpinned(ends_ + c, pinned);
        size_t found = 0;
        for (; found < victims.size(); ++found) {
            int32_t oldest = -1;
            for (int32_t c = 0; c < kClasses; ++c) {
                if (heads[at(c)] >= ends_) continue;  // nobody left in this class
                if (oldest < 0 || leaves_before(c, heads[at(c)], oldest, heads[at(oldest)])) {
                    oldest = c;
                }
            }
            if (oldest < 0) break;
            victims[found] = heads[at(oldest)];
            heads[at(oldest)] = next_unpinned(heads[at(oldest)], pinned);
        }
        return found;
    }

    // One that a prefetch brings in counts as used by the latest step.
    void inserted(int32_t expert) override { link(expert); }
    void evicted(int32_t expert) override { unlink(expert); }

private:
    struct Node {
        int32_t previous = -1;  // older
        int32_t next = -1;      // newer; -1: not in a list
        int64_t last_use = -1;  // step index
    };

    static constexpr size_t at(int32_t index) { return static_cast<size_t>(index); }
    Node& node(int32_t expert) { return nodes_[at(expert)]; }

    int32_t class_of(int32_t expert) const {
        const uint32_t count = std::max(1u, counts_[at(expert)]);
        return std::min(static_cast<int32_t>(std::bit_width(count)) - 1, kClasses - 1);
    }

    // age / 2^class compared without division.
    bool leaves_before(int32_t class_a, int32_t a, int32_t class_b, int32_t b) {
        const int64_t age_a = (now_ - node(a).last_use) << (kClasses - 1 - class_a);
        const int64_t age_b = (now_ - node(b).last_use) << (kClasses - 1 - class_b);
        return age_a > age_b || (age_a == age_b && a < b);
    }

    int32_t next_unpinned(int32_t from, std::span<const uint32_t> pinned) {
        int32_t next = node(from).next;
        while (next < ends_ && pinned[at(next)] != 0) next = node(next).next;
        return next;
    }

    void start_token() {
        ++tokens_;
        if (tokens_ == 0 || tokens_ % kTokensPerHalving != 0) return;
        by_age_.clear();
        for (int32_t expert = 0; expert < ends_; ++expert) {
            if (node(expert).next >= 0) by_age_.emplace_back(node(expert).last_use, expert);
        }
        std::sort(by_age_.begin(), by_age_.end());
        for (const auto& [age, expert] : by_age_) unlink(expert);
        for (uint32_t& count : counts_) count /= 2;
        for (const auto& [last_use, expert] : by_age_) link_as_newest(expert, last_use);
    }

    void unlink(int32_t expert) {
        Node& gone = node(expert);
        node(gone.previous).next = gone.next;
        node(gone.next).previous = gone.previous;
        gone.next = -1;
    }

    void link(int32_t expert) { link_as_newest(expert, now_); }

    // Among the experts of one step a list is sorted by id; a step has few.
    void link_as_newest(int32_t expert, int64_t last_use) {
        const int32_t end = ends_ + class_of(expert);
        int32_t older = node(end).previous;
        while (node(older).last_use == last_use && older > expert) older = node(older).previous;
        const int32_t newer = node(older).next;
        node(expert) = {older, newer, last_use};
        node(older).next = expert;
        node(newer).previous = expert;
    }

    int32_t ends_;                  // index of the first list's end; one per class
    std::vector<uint32_t> counts_;  // by flat expert
    std::vector<Node> nodes_;       // by flat expert, then the ends
    int64_t now_ = 0;
    int64_t tokens_ = -1;                              // index of the current one
    int32_t layer_ = 0;                                // of the latest step
    std::vector<std::pair<int64_t, int32_t>> by_age_;  // scratch
};

}  // namespace

std::unique_ptr<Policy> make_classlru(PolicyShape shape) {
    return std::make_unique<ClassLru>(shape);
}

}  // namespace moeinf
