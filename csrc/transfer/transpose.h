// Turns the matrices of an expert that files hold the other way round.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "layout/catalog.h"

namespace moeinf {

// Turns each matrix where it lies in the slot. `scratch` grows to the largest of them.
void apply(std::span<const Transpose> transposes, std::byte* slot, std::vector<std::byte>& scratch);

}  // namespace moeinf
