#include "transfer/read_plan.h"

#include <algorithm>

#include "base/sizes.h"

namespace moeinf {
namespace {

// To read a gap of this size costs less than a second request.
constexpr uint64_t kMaxGap = 32 << 10;

bool same_range(const Extent& before, uint64_t end, const Extent& after) {
    return before.file == after.file && after.file_offset <= end + kMaxGap;
}

// Appends the parts of `extents` (sorted, one file) that lie in [begin, end) as one chunk.
void add_chunk(std::span<const Extent> extents, uint64_t begin, uint64_t end, ReadPlan& plan) {
    Chunk chunk{extents.front().file, end, begin, plan.pieces.size(), 0};
    for (const Extent& extent : extents) {
        const uint64_t from = std::max(begin, extent.file_offset);
        const uint64_t to = std::min(end, extent.file_offset + extent.nbytes);
        if (from >= to) continue;
        plan.pieces.push_back({from, to - from, extent.slot_offset + (from - extent.file_offset)});
        chunk.begin = std::min(chunk.begin, from);
        chunk.end = std::max(chunk.end, to);
        ++chunk.num_pieces;
    }
    if (chunk.num_pieces > 0) plan.chunks.push_back(chunk);  // else it lies in a gap
}

// Cuts one range into chunks of nearly equal size.
void cut(std::span<const Extent> extents, uint64_t end, uint64_t chunk_bytes, ReadPlan& plan) {
    const uint64_t begin = extents.front().file_offset;
    const uint64_t base = begin / kChunkAlignment * kChunkAlignment;
    const uint64_t count = (end - base + chunk_bytes - 1) / chunk_bytes;
    const uint64_t each = (end - base + count - 1) / count;
    const uint64_t step = round_up(each, kChunkAlignment);
    for (uint64_t from = base; from < end; from += step) {
        add_chunk(extents, std::max(from, begin), std::min(from + step, end), plan);
    }
}

}  // namespace

ReadPlan plan_reads(std::span<const Extent> extents, size_t chunk_bytes) {
    std::vector<Extent> sorted(extents.begin(), extents.end());
    std::sort(sorted.begin(), sorted.end(), [](const Extent& left, const Extent& right) {
        return left.file != right.file ? left.file < right.file
                                       : left.file_offset < right.file_offset;
    });
    ReadPlan plan;
    for (size_t first = 0; first < sorted.size();) {
        uint64_t end = sorted[first].file_offset + sorted[first].nbytes;
        size_t last = first + 1;
        while (last < sorted.size() && same_range(sorted[first], end, sorted[last])) {
            end = std::max(end, sorted[last].file_offset + sorted[last].nbytes);
            ++last;
        }
        cut({sorted.data() + first, last - first}, end, chunk_bytes, plan);
        first = last;
    }
    return plan;
}

}  // namespace moeinf
