// Experts in lists by their last use, oldest first and the lower flat id before the higher; linked
// by index inside one array, so that a use and an eviction cost a few loads each.
#pragma once

#include <cstdint>
#include <vector>

#include "base/ids.h"

namespace moeinf {

class RecencyLists {
public:
    RecencyLists(int32_t experts, int32_t lists)
        : experts_(experts), nodes_(static_cast<size_t>(experts + lists)) {
        for (int32_t end = experts; end < experts + lists; ++end) node(end) = {end, end, -1};
    }

    [[nodiscard]] bool contains(ExpertId expert) const noexcept {
        return nodes_[index(expert)].newer >= 0;
    }
    [[nodiscard]] int64_t last_use(ExpertId expert) const noexcept {
        return nodes_[index(expert)].last_use;
    }

    // kNone at the end of the list.
    [[nodiscard]] ExpertId oldest(int32_t list) const noexcept { return after(experts_ + list); }
    [[nodiscard]] ExpertId newer(ExpertId expert) const noexcept { return after(number(expert)); }

    // Inserts it as the newest of its list. Experts of the same step stay in the order of ids; the
    // walk over them is short.
    void add(ExpertId expert, int32_t list, int64_t last_use) {
        const int32_t at = number(expert);
        int32_t older = node(experts_ + list).older;
        while (node(older).last_use == last_use && older > at) older = node(older).older;
        const int32_t newer = node(older).newer;
        node(at) = {older, newer, last_use};
        node(older).newer = at;
        node(newer).older = at;
    }

    void remove(ExpertId expert) {
        Node& gone = node(number(expert));
        node(gone.older).newer = gone.newer;
        node(gone.newer).older = gone.older;
        gone.newer = -1;
    }

private:
    struct Node {
        int32_t older = -1;
        int32_t newer = -1;     // -1: in no list
        int64_t last_use = -1;  // step index
    };

    Node& node(int32_t at) { return nodes_[static_cast<size_t>(at)]; }
    [[nodiscard]] ExpertId after(int32_t at) const noexcept {
        const int32_t newer = nodes_[static_cast<size_t>(at)].newer;
        return newer < experts_ ? ExpertId{newer} : ExpertId::kNone;
    }

    int32_t experts_;
    std::vector<Node> nodes_;  // by flat expert, then one per list that joins its ends
};

}  // namespace moeinf
