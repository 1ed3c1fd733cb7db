// Shared by all calls of the expert FFN: the kernels of one instruction set, the threads, and
// scratch memory that is kept between calls. One engine serves a process. Calls from several
// threads take turns on its threads.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#include "cpu_kernels/kernels.h"
#include "threads/thread_pool.h"

namespace moeinf {

// Uninitialised memory, in huge pages if it is large enough and the system allows them.
class ScratchBuffer {
public:
    ScratchBuffer() = default;
    explicit ScratchBuffer(size_t nbytes);
    [[nodiscard]] std::byte* data() const noexcept { return data_.get(); }
    [[nodiscard]] size_t size() const noexcept { return size_; }

private:
    struct Free {
        void operator()(std::byte* p) const noexcept;
    };
    size_t size_ = 0;
    std::unique_ptr<std::byte, Free> data_;
};

class CpuEngine {
public:
    // `threads` counts the caller, 0 means one for each CPU; `kernels` is a name from
    // kernel_sets(), empty for the best.
    explicit CpuEngine(int threads = 0, std::string_view kernels = {});

    [[nodiscard]] ThreadPool& pool() noexcept { return pool_; }
    [[nodiscard]] const KernelSet& kernels() const noexcept { return kernels_; }

    // A buffer of at least that size. The caller returns it after use. The largest one is kept. One
    // of more than kUsualScratch, for a long prompt, is kept until a call needs no more than that.
    static constexpr size_t kUsualScratch = size_t{64} << 20;
    [[nodiscard]] ScratchBuffer take_scratch(size_t nbytes);
    void give_scratch(ScratchBuffer buffer) noexcept;
    [[nodiscard]] size_t kept_scratch();

private:
    const KernelSet& kernels_;
    ThreadPool pool_;
    std::mutex scratch_lock_;
    std::unique_ptr<ScratchBuffer> spare_;
};

}  // namespace moeinf
