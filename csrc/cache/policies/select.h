// The scan that scored policies share: the lowest few of all residents, in one pass. Used where the
// order of residents changes with every step, so that keeping them sorted would cost more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace moeinf {

// Fills `victims` with the residents of the lowest keys that are not pinned, lowest first, and
// returns how many there were. `key(expert)` must differ from expert to expert, so that the outcome
// does not depend on slot order.
template <class Key>
size_t select_lowest(std::span<const int32_t> residents, std::span<const uint32_t> pinned,
                     std::span<int32_t> victims, const Key& key) {
    if (victims.empty()) return 0;
    size_t found = 0;
    auto highest = key(0);  // of those in `victims`; means nothing before they are full
    for (const int32_t expert : residents) {
        if (expert < 0 || pinned[static_cast<size_t>(expert)] != 0) continue;
        const auto candidate = key(expert);
        if (found == victims.size() && !(candidate < highest)) continue;
        size_t at = found < victims.size() ? found++ : found - 1;
        for (; at > 0 && candidate < key(victims[at - 1]); --at) victims[at] = victims[at - 1];
        victims[at] = expert;
        highest = key(victims[found - 1]);
    }
    return found;
}

}  // namespace moeinf
