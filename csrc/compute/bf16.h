// Single numbers of bf16. Rows of them are the kernels' of an instruction set.
#pragma once

#include <bit>
#include <cstdint>

#include "base/dtype.h"

namespace moeinf {

// To the nearest, ties to even; a NaN is made quiet and stays one.
inline BF16 rounded(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    return {static_cast<uint16_t>((value != value ? bits | 0x00400000u : nearest) >> 16)};
}

inline float widened(BF16 value) {
    return std::bit_cast<float>(uint32_t{value.bits} << 16);
}

}  // namespace moeinf
