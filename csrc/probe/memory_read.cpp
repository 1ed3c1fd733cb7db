#include "probe/memory_read.h"

#include <atomic>
#include <string>

#include "base/error.h"

namespace moeinf {
namespace {

using Words = uint64_t __attribute__((vector_size(16), may_alias));
constexpr size_t kLine = 64;

template <int kStreams>
uint64_t read_part(const std::byte* data, size_t nbytes) {
    const size_t stream = nbytes / kStreams;
    Words seen[kStreams] = {};
    for (size_t i = 0; i < stream; i += kLine) {
#pragma GCC unroll 8
        for (int s = 0; s < kStreams; ++s) {
            const auto* line = reinterpret_cast<const Words*>(data + s * stream + i);
            seen[s] |= (line[0] | line[1]) | (line[2] | line[3]);
        }
    }
    uint64_t all = 0;
    for (const Words& words : seen) all |= words[0] | words[1];
    return all;
}

}  // namespace

uint64_t read_all(ThreadPool& pool, const std::byte* data, size_t nbytes, size_t task_bytes,
                  int streams) {
    uint64_t (*const read)(const std::byte*, size_t) = streams == 1   ? read_part<1>
                                                       : streams == 2 ? read_part<2>
                                                       : streams == 4 ? read_part<4>
                                                       : streams == 8 ? read_part<8>
                                                                      : nullptr;
    if (read == nullptr || task_bytes == 0 || task_bytes % 4096 != 0 || nbytes % task_bytes != 0) {
        throw Error(ErrorCode::kInvalid,
                    "read probe: streams must be 1, 2, 4 or 8, task_bytes a multiple of 4096 and "
                    "nbytes a multiple of task_bytes; got " +
                        std::to_string(streams) + ", " + std::to_string(task_bytes) + ", " +
                        std::to_string(nbytes));
    }
    std::atomic<uint64_t> all{0};
    pool.run(static_cast<int64_t>(nbytes / task_bytes), [&](int64_t task) noexcept {
        const size_t first = static_cast<size_t>(task) * task_bytes;
        all.fetch_or(read(data + first, task_bytes), std::memory_order_relaxed);
    });
    return all.load();
}

}  // namespace moeinf
