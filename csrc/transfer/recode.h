// Writes integers of an expert again in the code that the kernels read.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "layout/catalog.h"

namespace moeinf {

// AWQ holds column kAwqOrder[i] of eight in the bits from 4 * i on.
inline constexpr int kAwqOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};

// `scratch` grows to a few rows of a matrix.
void recode(std::span<const Recode> recodes, std::byte* slot, std::vector<uint32_t>& scratch);

}  // namespace moeinf
