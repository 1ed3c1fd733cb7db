// Detects that the process was forked. Costs one memory read, where getpid() is a system call.
// Threads, locks and the CUDA driver do not survive a fork: an object that has one refuses to work
// in the child.
#pragma once

#include <cstdint>

namespace moeinf {

// Constant in a process. A child that is forked after the first call has another number.
[[nodiscard]] int64_t process_generation() noexcept;

// A member of the objects concerned.
class ForkDetector {
public:
    [[nodiscard]] bool forked() const noexcept { return process_generation() != generation_; }

private:
    int64_t generation_ = process_generation();
};

}  // namespace moeinf
