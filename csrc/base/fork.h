// Tells a forked child from its parent at the cost of a load. Threads, locks and the CUDA driver do
// not survive a fork: an object that has one refuses to work in the child.
#pragma once

#include <cstdint>

namespace moeinf {

// The same number throughout a process, another in a child forked from it after the first call.
[[nodiscard]] int64_t process_generation() noexcept;

// A member of the objects concerned.
class ForkDetector {
public:
    [[nodiscard]] bool forked() const noexcept { return process_generation() != generation_; }

private:
    int64_t generation_ = process_generation();
};

}  // namespace moeinf
