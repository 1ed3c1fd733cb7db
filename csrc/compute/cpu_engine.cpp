#include "compute/cpu_engine.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>
#include <utility>

#include "base/sizes.h"

namespace moeinf {
namespace {

constexpr size_t kCacheLine = 64;

}  // namespace

ScratchBuffer::ScratchBuffer(size_t nbytes) {
    const size_t alignment = nbytes >= 2 * kHugePage ? kHugePage : kCacheLine;
    size_ = round_up(nbytes == 0 ? 1 : nbytes, alignment);
    data_.reset(static_cast<std::byte*>(std::aligned_alloc(alignment, size_)));
    if (data_ == nullptr) throw std::bad_alloc();
    if (alignment == kHugePage) madvise(data_.get(), size_, MADV_HUGEPAGE);
}

void ScratchBuffer::Free::operator()(std::byte* p) const noexcept {
    std::free(p);
}

CpuEngine::CpuEngine(int threads, std::string_view kernels)
    : kernels_(select_kernels(kernels)), pool_(threads) {}

ScratchBuffer CpuEngine::take_scratch(size_t nbytes) {
    std::unique_ptr<ScratchBuffer> kept;
    {
        const std::lock_guard lock(scratch_lock_);
        kept = std::move(spare_);
    }
    const bool too_large =
        kept != nullptr && kept->size() > 2 * kUsualScratch && nbytes <= kUsualScratch;
    if (kept != nullptr && kept->size() >= nbytes && !too_large) return std::move(*kept);
    kept.reset();
    return ScratchBuffer(nbytes);
}

void CpuEngine::give_scratch(ScratchBuffer buffer) noexcept {
    auto kept = std::unique_ptr<ScratchBuffer>(new (std::nothrow) ScratchBuffer(std::move(buffer)));
    const std::lock_guard lock(scratch_lock_);
    if (spare_ == nullptr || (kept != nullptr && spare_->size() < kept->size())) {
        spare_ = std::move(kept);
    }
}

size_t CpuEngine::kept_scratch() {
    const std::lock_guard lock(scratch_lock_);
    return spare_ == nullptr ? 0 : spare_->size();
}

}  // namespace moeinf
