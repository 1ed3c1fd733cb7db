// Tells a forked child from its parent at the cost of a load, for calls too frequent to ask the
// system each time.
#pragma once

#include <cstdint>

namespace moeinf {

// The same number throughout a process, another in a child forked from it after the first call.
[[nodiscard]] int64_t process_generation() noexcept;

}  // namespace moeinf
