// Finds numbers in a slot that no product may meet: NaN and infinities, which a decoder would take
// for large numbers, and negative numbers where only sizes belong.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout/catalog.h"

namespace moeinf {

// Checks the numbers in [begin, end) of the slot, which cuts none of them. Throws Error(kRead) that
// names file and tensor.
void check_numbers(const Catalog& catalog, ExpertId expert, const std::byte* slot, uint64_t begin,
                   uint64_t end);

}  // namespace moeinf
