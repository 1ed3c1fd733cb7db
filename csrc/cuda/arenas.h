// Arenas of device memory and of page-locked RAM. Both hold memory in pieces, so that they grow
// and shrink at their end; nothing may be using what a shrink gives back.
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
