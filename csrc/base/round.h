// Sizes rounded up to whole pages, blocks and pieces.
#pragma once

#include <cstddef>

namespace moeinf {

// The smallest multiple of `unit` that is not below `value`.
[[nodiscard]] constexpr size_t round_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

}  // namespace moeinf
