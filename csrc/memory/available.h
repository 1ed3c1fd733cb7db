// How much RAM this process can still take. Arenas ask before they grow, so a budget that is too
// large is an error at once; else the system would kill the process later. Reserves nothing.
#pragma once

#include <cstdint>

namespace moeinf {

// Bytes that the kernel calls available, plus free swap. Less if a control group (a container) has
// a lower limit. UINT64_MAX if the system does not say.
[[nodiscard]] uint64_t available_memory();

}  // namespace moeinf
