// How much RAM this process can still take. Arenas ask before they grow, so a budget that is too
// large is an error at once; else the system would kill the process later. Reserves nothing.
#pragma once

#include <cstdint>
#include <string>

namespace moeinf {

// Bytes that the kernel calls available. Less if a control group (a container) of version 1 or 2,
// or one above it, has a lower limit. Swap does not count. UINT64_MAX if the system does not say.
// `proc` and `cgroups` are the folders to ask.
[[nodiscard]] uint64_t system_memory(const std::string& proc, const std::string& cgroups);

// Bytes that arenas of RAM have committed and that nothing has touched so far. The system still
// counts them as available.
[[nodiscard]] uint64_t promised_memory();

// The memory of this system, less that which arenas have promised but not used so far.
[[nodiscard]] uint64_t available_memory();

}  // namespace moeinf
