// Detects that the process was forked. Costs one memory read, where getpid() is a system call.
#pragma once

#include <cstdint>

namespace moeinf {

// Constant in a process. A child that is forked after the first call has another number.
[[nodiscard]] int64_t process_generation() noexcept;

}  // namespace moeinf
