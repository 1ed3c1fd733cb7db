// How much RAM this process could still take. Arenas ask before they grow, so that a budget that
// cannot be met is an error at once and not a killed process later. Never reserves anything.
#pragma once

#include <cstdint>

namespace moeinf {

// Bytes: what the kernel says is available plus free swap, or less where a control group (a
// container) sets a lower limit. UINT64_MAX where the system does not tell.
[[nodiscard]] uint64_t available_memory();

}  // namespace moeinf
