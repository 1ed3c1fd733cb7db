// The product of bf16 matrices on the matrix unit of x86: weights are read where they lie.
#include "cpu_kernels/tiles_amx.h"

#include "base/dtype.h"

namespace moeinf {
namespace {

// A tile of weights that would reach past the matrix: its part of it, and zeros.
const std::byte* padded(const std::byte* w, int64_t stride, int64_t outputs, int64_t bytes,
                        std::byte* to) {
    std::memset(to, 0, kTileBytes);
    for (int64_t n = 0; n < outputs; ++n) {
        std::memcpy(to + n * kLine, w + n * stride, static_cast<size_t>(bytes));
    }
    written();
    return to;
}

struct Walk {
    const DotJob& job;
    const std::byte* w;     // of the first output
    int64_t outputs;        // 1 to 32
    const std::byte* x[2];  // the arranged activations
    int64_t rows[2];        // how many they are
    const char* ahead;      // memory that comes next; null: do not ask for it
};

// Loads a tile of weights at a step.
template <int kHalf>
void load_weights(const Walk& walk, int64_t step) {
    const int64_t outputs = std::min(kTileRows, walk.outputs - kHalf * kTileRows);
    const int64_t depth = std::min(kTileDepth, walk.job.depth - step * kTileDepth);
    const std::byte* w = walk.w + kHalf * kTileRows * walk.job.w_stride + step * kLine;
    int64_t stride = walk.job.w_stride;
    alignas(64) std::byte part[kTileBytes];
    if (outputs != kTileRows || depth != kTileDepth) {
        w = padded(w, stride, outputs, 2 * depth, part);
        stride = kLine;
    }
    if constexpr (kHalf == 0) {
        _tile_loadd(4, w, stride);
    } else {
        _tile_loadd(5, w, stride);
    }
}

template <bool kTwoOutputs, bool kTwoRows>
void walk_depth(const Walk& walk, float* y) {
    _tile_zero(0);
    if constexpr (kTwoRows) _tile_zero(1);
    if constexpr (kTwoOutputs) _tile_zero(2);
    if constexpr (kTwoOutputs && kTwoRows) _tile_zero(3);
    const int64_t steps = (walk.job.depth + kTileDepth - 1) / kTileDepth;
    const char* ahead = walk.ahead;
    for (int64_t step = 0; step < steps; ++step) {
        if (ahead != nullptr) {
            for (int i = 0; i < kStreams; ++i) __builtin_prefetch(ahead + i * kLine, 0, 2);
            ahead += kStreams * kLine;
        }
        load_weights<0>(walk, step);
        if constexpr (kTwoOutputs) load_weights<1>(walk, step);
        const int64_t first = 4 * walk.rows[0];
        _tile_loadd(6, walk.x[0] + step * kTileRows * first, first);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kTwoOutputs) _tile_dpbf16ps(2, 5, 6);
        if constexpr (kTwoRows) {
            const int64_t second = 4 * walk.rows[1];
            _tile_loadd(7, walk.x[1] + step * kTileRows * second, second);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (kTwoOutputs) _tile_dpbf16ps(3, 5, 7);
        }
    }
    alignas(64) float sums[4][kTileRows * kTileRows];
    _tile_stored(0, sums[0], kLine);
    if constexpr (kTwoRows) _tile_stored(1, sums[1], kLine);
    if constexpr (kTwoOutputs) _tile_stored(2, sums[2], kLine);
    if constexpr (kTwoOutputs && kTwoRows) _tile_stored(3, sums[3], kLine);
    const int64_t stride = walk.job.y_stride;
    for (int half = 0; half < (kTwoOutputs ? 2 : 1); ++half) {
        const int64_t outputs = walk.outputs - half * kTileRows;
        float* to = y + half * kTileRows;
        write(sums[2 * half], walk.rows[0], outputs, to, stride);
        if (kTwoRows) {
            write(sums[2 * half + 1], walk.rows[1], outputs, to + kTileRows * stride, stride);
        }
    }
}

}  // namespace

void amx_bf16(const DotJob& job) {
    for (int64_t row = 0; row < job.rows; row += 2 * kTileRows) {
        const int64_t first = std::min(kTileRows, job.rows - row);
        const int64_t second = std::min(kTileRows, job.rows - row - first);
        configure(first, second);
        const auto tile = [&](int64_t at) {
            return static_cast<const std::byte*>(job.x[at / kTileRows]);
        };
        Walk walk{.job = job,
                  .w = job.w,
                  .outputs = 0,
                  .x = {tile(row), second > 0 ? tile(row + kTileRows) : nullptr},
                  .rows = {first, second},
                  .ahead = nullptr};
        for (int64_t n = 0; n < job.outputs; n += 2 * kTileRows) {
            walk.outputs = std::min(2 * kTileRows, job.outputs - n);
            walk.w = job.w + n * job.w_stride;
            const bool more = n + 2 * kTileRows < job.outputs;
            walk.ahead = job.from_memory && row == 0 && more
                             ? reinterpret_cast<const char*>(walk.w + 2 * kTileRows * job.w_stride)
                             : nullptr;
            float* y = job.y + row * job.y_stride + n;
            if (walk.outputs > kTileRows) {
                second > 0 ? walk_depth<true, true>(walk, y) : walk_depth<true, false>(walk, y);
            } else {
                second > 0 ? walk_depth<false, true>(walk, y) : walk_depth<false, false>(walk, y);
            }
        }
    }
    _tile_release();
}

void amx_arrange(const void* const* rows, int64_t count, int64_t depth, void* to) {
    auto* out = static_cast<std::byte*>(to);
    const int64_t tiles = (depth + kTileDepth - 1) / kTileDepth;
    auto* sums = reinterpret_cast<float*>(out + tiles * kLine * count);
    const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
    for (int64_t k = 0; k < depth; k += kTileDepth) {
        const int64_t left = std::min(kTileDepth, depth - k);
        const auto part = static_cast<__mmask32>((uint64_t{1} << left) - 1);
        const auto columns = static_cast<__mmask16>((1u << count) - 1u);
        Lines lines;
        for (int64_t r = 0; r < kTileRows; ++r) {
            lines[r] = r < count
                           ? _mm512_maskz_loadu_epi16(part, static_cast<const BF16*>(rows[r]) + k)
                           : _mm512_setzero_si512();
        }
        transpose(lines);
        __m512 sum = _mm512_setzero_ps();
        for (const __m512i& line : lines) {
            _mm512_mask_storeu_epi32(out, columns, line);
            out += 4 * count;
            sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(line), ones);
        }
        _mm512_mask_storeu_ps(sums, columns, sum);
        sums += count;
    }
}

}  // namespace moeinf
