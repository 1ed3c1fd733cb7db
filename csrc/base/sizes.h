// Sizes in bytes that several rooms share, and how to round up to them.
#pragma once

#include <cstddef>

namespace moeinf {

inline constexpr size_t kPage = 4096;
inline constexpr size_t kHugePage = size_t{2} << 20;
inline constexpr size_t kGatherUnit = 16;  // what the gather kernel moves at a time

// The smallest multiple of `unit` that is not below `value`.
[[nodiscard]] constexpr size_t round_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

}  // namespace moeinf
