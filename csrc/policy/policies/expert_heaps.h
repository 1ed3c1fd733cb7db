// Keeps residents in order for policies whose scores change with use: one binary min-heap per group
// of experts (all experts, or one layer each), linked by index. A use, an insertion and an eviction
// cost O(log n). Finding the lowest few changes nothing and reads a few experts of each group. A
// scan of 1,800 residents took 4 us instead.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "policy/policy.h"

namespace moeinf {

// The order of policies with the score value[expert] * factor[layer]. All scores of a layer share
// one factor, so the order within a layer is the order of values and changes only with them. Two
// unequal values of a layer may round to one score; they keep their order. Ties go to the lower
// flat id.
template <class Value>
struct ScaledOrder {
    struct Key {
        Value score;
        int32_t layer;
        Value value;
        ExpertId expert;
        bool operator<(const Key& other) const {
            if (score < other.score) return true;
            if (score > other.score) return false;
            if (layer != other.layer) return layer < other.layer;
            if (value != other.value) return value < other.value;
            return expert < other.expert;
        }
    };

    explicit ScaledOrder(ModelShape shape) : values(shape.total()), factors(shape.num_layers) {}

    Key key(int32_t layer, ExpertId expert) const {
        const Value value = values[expert];
        return {value * factors[LayerId{layer}], layer, value, expert};
    }
    bool before(ExpertId a, ExpertId b) const {
        const Value value_a = values[a];
        const Value value_b = values[b];
        return value_a < value_b || (value_a == value_b && a < b);
    }

    PerExpert<Value> values;
    PerLayer<Value> factors;
};

// Group g holds experts of flat ids [g * per_group, (g + 1) * per_group). An Order says which
// expert is evicted first: `before(a, b)` for two experts of one group, a strict total order;
// `key(group, expert)` for experts of any groups, never in contradiction to `before`. It must
// outlive the heaps.
template <class Order>
class ExpertHeaps {
public:
    ExpertHeaps(int32_t groups, int32_t per_group, const Order& order)
        : order_(order),
          per_group_(per_group),
          groups_(static_cast<size_t>(groups)),
          items_(static_cast<size_t>(groups * per_group)),
          positions_(items_.size(), -1) {}

    void add(ExpertId expert) {
        Group& group = group_of(expert);
        const int32_t base = base_of(expert);
        const int32_t end = base + group.size++;
        group.is_heap ? rise(expert, base, end) : put(expert, end);
    }

    void remove(ExpertId expert) {
        Group& group = group_of(expert);
        const int32_t base = base_of(expert);
        const int32_t hole = positions_[expert];
        const ExpertId last = item(base + --group.size);
        positions_[expert] = -1;
        if (last == expert) return;
        if (!group.is_heap) return put(last, hole);
        rise(last, base, hole);
        sink(last, base, group.size);
    }

    // Call this for every expert whose place in the order rose.
    void raised(ExpertId expert) {
        const Group& group = group_of(expert);
        if (positions_[expert] < 0 || !group.is_heap) return;
        sink(expert, base_of(expert), group.size);
    }

    // Call this when any number of experts of a group, or of all groups, changed places. The heap
    // is made again when a victim is wanted: a step that only hits does not pay for it.
    void reordered(int32_t group) { groups_[static_cast<size_t>(group)].is_heap = false; }
    void reordered() {
        for (Group& group : groups_) group.is_heap = false;
    }

    // Fills `victims` with the lowest unpinned experts, lowest first, and returns their number. The
    // search begins at the roots, because no expert is lower than its parent. The frontier has
    // about one expert per group, and scanning it for each victim is faster than keeping it in
    // order.
    size_t lowest(const Pins& pins, std::span<ExpertId> victims) {
        frontier_.clear();
        for (int32_t group = 0; group < static_cast<int32_t>(groups_.size()); ++group) {
            make_heap(group);
            if (groups_[static_cast<size_t>(group)].size > 0) reach(group, group * per_group_);
        }
        size_t found = 0;
        while (found < victims.size() && !frontier_.empty()) {
            const auto lowest = std::min_element(frontier_.begin(), frontier_.end());
            const auto [key, group, at] = *lowest;
            *lowest = frontier_.back();
            frontier_.pop_back();
            const ExpertId expert = item(at);
            if (pins[expert] == 0) victims[found++] = expert;
            const int32_t base = group * per_group_;
            const int32_t end = base + groups_[static_cast<size_t>(group)].size;
            const int32_t child = base + 2 * (at - base) + 1;
            for (int32_t next = child; next < std::min(child + 2, end); ++next) reach(group, next);
        }
        return found;
    }

private:
    struct Group {
        int32_t size = 0;
        bool is_heap = true;
    };
    struct Candidate {
        decltype(std::declval<const Order&>().key(0, ExpertId{0})) key;
        int32_t group;
        int32_t at;
        bool operator<(const Candidate& other) const { return key < other.key; }
    };

    void make_heap(int32_t group) {
        const int32_t base = group * per_group_;
        auto& [size, is_heap] = groups_[static_cast<size_t>(group)];
        if (std::exchange(is_heap, true)) return;
        for (int32_t at = base + size / 2 - 1; at >= base; --at) sink(item(at), base, size);
    }

    void reach(int32_t group, int32_t at) {
        frontier_.push_back({order_.key(group, item(at)), group, at});
    }

    ExpertId& item(int32_t at) { return items_[static_cast<size_t>(at)]; }
    Group& group_of(ExpertId expert) {
        return groups_[static_cast<size_t>(number(expert) / per_group_)];
    }
    [[nodiscard]] int32_t base_of(ExpertId expert) const {
        return number(expert) - number(expert) % per_group_;
    }

    void put(ExpertId expert, int32_t at) {
        item(at) = expert;
        positions_[expert] = at;
    }

    void rise(ExpertId expert, int32_t base, int32_t at) {
        while (at > base) {
            const int32_t parent = base + (at - base - 1) / 2;
            if (!order_.before(expert, item(parent))) break;
            put(item(parent), at);
            at = parent;
        }
        put(expert, at);
    }

    void sink(ExpertId expert, int32_t base, int32_t size) {
        int32_t at = positions_[expert];
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
    std::vector<Group> groups_;
    std::vector<ExpertId> items_;      // each group's heap lies at its experts' own ids
    PerExpert<int32_t> positions_;     // index into items_, -1: absent
    std::vector<Candidate> frontier_;  // scratch
};

// A policy that evicts the lowest of an Order. A subclass changes the order as it sees steps.
template <class Order>
class OrderedPolicy : public Policy {
public:
    size_t choose_victims(std::span<const ExpertId> /*residents*/, const Pins& pins,
                          std::span<ExpertId> victims) override {
        return residents_.lowest(pins, victims);
    }
    void inserted(ExpertId expert) override { residents_.add(expert); }
    void evicted(ExpertId expert) override { residents_.remove(expert); }

protected:
    OrderedPolicy(int32_t groups, int32_t per_group, Order order)
        : order_(std::move(order)), residents_(groups, per_group, order_) {}

    Order order_;
    ExpertHeaps<Order> residents_;
};

}  // namespace moeinf
