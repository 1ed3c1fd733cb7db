// Least recently used. Age is the index of the step that used an expert last; the oldest leaves
// first, and among those of one step the lower flat id. Residents form one list, oldest first,
// linked by index inside one array, so that a use and an eviction cost a few loads each.
#include "policy/policies/policies.h"

namespace moeinf {
namespace {

class Lru final : public Policy {
public:
    explicit Lru(PolicyShape shape)
        : nodes_(static_cast<size_t>(shape.total()) + 1), ends_(shape.total()) {
        node(ends_) = {ends_, ends_, -1};
    }

    std::string_view name() const noexcept override { return "lru"; }

    void observe(const Step& step) override {
        now_ = step.index;
        for (const int32_t expert : step.experts) {
            if (node(expert).next < 0) continue;  // absent; inserted() will link it
            unlink(expert);
            link_as_newest(expert);
        }
    }

    size_t choose_victims(std::span<const int32_t> /*residents*/, std::span<const uint32_t> pinned,
                          std::span<int32_t> victims) override {
        size_t found = 0;
        for (int32_t expert = node(ends_).next; expert != ends_ && found < victims.size();
             expert = node(expert).next) {
            if (pinned[static_cast<size_t>(expert)] == 0) victims[found++] = expert;
        }
        return found;
    }

    // One that a prefetch brings in counts as used by the latest step.
    void inserted(int32_t expert) override { link_as_newest(expert); }
    void evicted(int32_t expert) override { unlink(expert); }

private:
    struct Node {
        int32_t previous = -1;  // older
        int32_t next = -1;      // newer; -1: not in the list
        int64_t last_use = -1;  // step index
    };

    Node& node(int32_t expert) { return nodes_[static_cast<size_t>(expert)]; }

    void unlink(int32_t expert) {
        Node& gone = node(expert);
        node(gone.previous).next = gone.next;
        node(gone.next).previous = gone.previous;
        gone.next = -1;
    }

    // Among the experts of one step the list is sorted by id; a step has few.
    void link_as_newest(int32_t expert) {
        int32_t older = node(ends_).previous;
        while (node(older).last_use == now_ && older > expert) older = node(older).previous;
        const int32_t newer = node(older).next;
        node(expert) = {older, newer, now_};
        node(older).next = expert;
        node(newer).previous = expert;
    }

    std::vector<Node> nodes_;  // by flat expert, and one that joins both ends
    int32_t ends_;             // index of that one
    int64_t now_ = 0;
};

}  // namespace

std::unique_ptr<Policy> make_lru(PolicyShape shape) {
    return std::make_unique<Lru>(shape);
}

}  // namespace moeinf
