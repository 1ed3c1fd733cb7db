// Puts the bytes of an expert in their places in a slot. Matrices that files hold the other way
// round are turned on the way, so no matrix is held twice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "layout/catalog.h"

namespace moeinf {

// `bytes` belong at `slot_offset`, as they are read. They may begin and end anywhere in a matrix,
// even within an element. Threads may place other bytes of the same matrix at the same time.
void place(std::span<const std::byte> bytes, uint64_t slot_offset,
           std::span<const Transpose> transposes, std::byte* slot);

}  // namespace moeinf
