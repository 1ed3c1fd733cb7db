// Sums of rows of 32-bit floats in the order of ATen's: the bits of a sum depend on its order.
#pragma once

#include <cstdint>

namespace moeinf {

// Of no more than 2^20 numbers beside each other.
[[nodiscard]] float row_sum(const float* values, int64_t count);

}  // namespace moeinf
