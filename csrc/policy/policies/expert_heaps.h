// Keeps residents ordered for policies whose scores change with use: one binary min-heap per group
// of experts (all of them, or one layer each), linked by index. A use, an insertion and an eviction
// cost O(log n); naming the lowest few changes nothing and looks at a few experts of each group,
// where a scan of all residents took 4 us at 1,800 of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace moeinf {

// Group g holds experts of flat ids [g * per_group, (g + 1) * per_group). An Order says who leaves
// first: `before(a, b)` for two experts of one group, a strict total order; `key(group, expert)`
// for experts of any groups, never in contradiction to `before`. It must outlive the heaps.
template <class Order>
class ExpertHeaps {
public:
    ExpertHeaps(int32_t groups, int32_t per_group, const Order& order)
        : order_(order),
          per_group_(per_group),
          sizes_(static_cast<size_t>(groups), 0),
          items_(static_cast<size_t>(groups * per_group)),
          positions_(items_.size(), -1) {}

    void add(int32_t expert) {
        int32_t& size = sizes_[static_cast<size_t>(expert / per_group_)];
        const int32_t base = expert - expert % per_group_;
        rise(expert, base, base + size++);
    }

    void remove(int32_t expert) {
        int32_t& size = sizes_[static_cast<size_t>(expert / per_group_)];
        const int32_t base = expert - expert % per_group_;
        const int32_t hole = position(expert);
        const int32_t last = item(base + --size);
        position(expert) = -1;
        if (last == expert) return;
        rise(last, base, hole);
        sink(last, base, size);
    }

    // To be called for every expert whose place in the order rose.
    void raised(int32_t expert) {
        if (position(expert) < 0) return;  // absent
        sink(expert, expert - expert % per_group_,
             sizes_[static_cast<size_t>(expert / per_group_)]);
    }

    // To be called when any number of experts changed places, or only experts of one group.
    void rebuild() {
        for (size_t group = 0; group < sizes_.size(); ++group) {
            rebuild(static_cast<int32_t>(group));
        }
    }
    void rebuild(int32_t group) {
        const int32_t size = sizes_[static_cast<size_t>(group)];
        const int32_t base = group * per_group_;
        for (int32_t at = base + size / 2 - 1; at >= base; --at) sink(item(at), base, size);
    }

    // Fills `victims` with the lowest that are not pinned, lowest first, and returns how many there
    // were. Learned first from the roots: nobody is below its parent. The frontier has about as
    // many as there are groups: scanning it for each victim is faster than keeping it in order.
    size_t lowest(std::span<const uint32_t> pinned, std::span<int32_t> victims) {
        frontier_.clear();
        for (int32_t group = 0; group < static_cast<int32_t>(sizes_.size()); ++group) {
            if (sizes_[static_cast<size_t>(group)] > 0) reach(group, group * per_group_);
        }
        size_t found = 0;
        while (found < victims.size() && !frontier_.empty()) {
            const auto lowest = std::min_element(frontier_.begin(), frontier_.end());
            const auto [key, group, at] = *lowest;
            *lowest = frontier_.back();
            frontier_.pop_back();
            const int32_t expert = item(at);
            if (pinned[static_cast<size_t>(expert)] == 0) victims[found++] = expert;
            const int32_t base = group * per_group_;
            const int32_t end = base + sizes_[static_cast<size_t>(group)];
            const int32_t child = base + 2 * (at - base) + 1;
            for (int32_t next = child; next < std::min(child + 2, end); ++next) reach(group, next);
        }
        return found;
    }

private:
    struct Candidate {
        decltype(std::declval<const Order&>().key(0, 0)) key;
        int32_t group;
        int32_t at;
        bool operator<(const Candidate& other) const { return key < other.key; }
    };

    void reach(int32_t group, int32_t at) {
        frontier_.push_back({order_.key(group, item(at)), group, at});
    }

    int32_t& item(int32_t at) { return items_[static_cast<size_t>(at)]; }
    int32_t& position(int32_t expert) { return positions_[static_cast<size_t>(expert)]; }

    void put(int32_t expert, int32_t at) {
        item(at) = expert;
        position(expert) = at;
    }

    void rise(int32_t expert, int32_t base, int32_t at) {
        while (at > base) {
            const int32_t parent = base + (at - base - 1) / 2;
            if (!order_.before(expert, item(parent))) break;
            put(item(parent), at);
            at = parent;
        }
        put(expert, at);
    }

    void sink(int32_t expert, int32_t base, int32_t size) {
        int32_t at = position(expert);
        for (;;) {
            int32_t child = base + 2 * (at - base) + 1;
            if (child >= base + size) break;
            if (child + 1 < base + size && order_.before(item(child + 1), item(child))) ++child;
            if (!order_.before(item(child), expert)) break;
            put(item(child), at);
            at = child;
        }
        put(expert, at);
    }

    const Order& order_;
    int32_t per_group_;
    std::vector<int32_t> sizes_;       // by group
    std::vector<int32_t> items_;       // each group's heap lies at its experts' own ids
    std::vector<int32_t> positions_;   // by flat expert, index into items_, -1: absent
    std::vector<Candidate> frontier_;  // scratch
};

}  // namespace moeinf
