// Arenas of device memory and of page-locked RAM. Both hold their memory in pieces, so an arena
// grows and shrinks at its end. No copy and no kernel may use the memory that a shrink returns.
#pragma once

#include <cstddef>
#include <memory>

#include "cuda/context.h"
#include "memory/arena.h"

namespace moeinf::cuda {

std::unique_ptr<Arena> make_device_arena(std::shared_ptr<const Context> context,
                                         size_t reserve_bytes);
std::unique_ptr<Arena> make_pinned_arena(std::shared_ptr<const Context> context,
                                         size_t reserve_bytes, size_t unit);

}  // namespace moeinf::cuda
