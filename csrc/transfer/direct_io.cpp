#include "transfer/direct_io.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace moeinf {
namespace {

constexpr size_t kUsualAlignment = 4096;  // enough on every common file system
constexpr size_t kMaxAlignment = size_t{64} << 10;

// The kernel's answer (Linux 6.1 and later, some file systems), or kUsualAlignment; 0: not
// supported.
size_t stated_alignment(int descriptor) {
#ifdef STATX_DIOALIGN
    struct statx status{};
    if (statx(descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 &&
        (status.stx_mask & STATX_DIOALIGN) != 0) {
        return std::max<size_t>(status.stx_dio_mem_align, status.stx_dio_offset_align);
    }
#endif
    return kUsualAlignment;
}

bool reads_directly(int descriptor, size_t alignment) {
    const std::unique_ptr<void, decltype(&std::free)> buffer(
        std::aligned_alloc(alignment, alignment), &std::free);
    if (buffer == nullptr) return false;
    ssize_t count = 0;
    do {
        count = pread(descriptor, buffer.get(), alignment, 0);
    } while (count < 0 && errno == EINTR);
    return count >= 0;
}

}  // namespace

size_t enable_direct_io(int descriptor) {
    // tmpfs accepts the flag on recent kernels and ignores it. Its bytes are in memory already.
    struct statfs system{};
    if (fstatfs(descriptor, &system) != 0 || system.f_type == TMPFS_MAGIC) return 1;

    const size_t alignment = stated_alignment(descriptor);
    if (!std::has_single_bit(alignment) || alignment < 2 || alignment > kMaxAlignment) return 1;

    const int flags = fcntl(descriptor, F_GETFL);
    if (flags < 0 || fcntl(descriptor, F_SETFL, flags | O_DIRECT) != 0) return 1;
    if (reads_directly(descriptor, alignment)) return alignment;
    (void)fcntl(descriptor, F_SETFL, flags);
    return 1;
}

}  // namespace moeinf
