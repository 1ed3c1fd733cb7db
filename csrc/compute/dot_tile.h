// The matrix product of the expert FFN, written once over a `Product` type and compiled for each
// instruction set (included only by kernels_*.cpp; unnamed for the reason float_math.h gives).
//
// Both operands lie with their depth contiguous, so no packing is needed: a tile of kRows
// activations by kOutputs weight rows keeps one vector of partial sums for each pair, walks the
// depth once, and folds the lanes at the end. Each loaded weight vector serves kRows products and
// each activation vector kOutputs; the weight rows of a tile stay in the L1 cache while all
// activations pass over them. The sum of a pair is formed in the same order in every tile shape.
//
// Product: X, W element types; Acc, XVec, WVec registers; kStep elements of depth at a time;
// kRows, kOutputs; load_x, load_w, load_x_first, load_w_first (n < kStep elements, rest zero);
// madd(acc, x, w); zero(); sum4(a, b, c, d, out): the four sums of lanes.
#pragma once

#include "compute/kernels.h"

namespace moeinf {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line

// `ahead` is walked along with the depth, kAhead cache lines a step, to bring it nearer.
template <class P, int kRows, int kOutputs, int kAhead = 0>
inline void dot_tile(const void* const* x, const typename P::W* w, int64_t depth, float* y,
                     int64_t y_stride, const char* ahead = nullptr) {
    typename P::Acc acc[kRows][kOutputs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < kOutputs; ++n) acc[r][n] = P::zero();
    }
    const typename P::X* rows[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) rows[r] = static_cast<const typename P::X*>(x[r]);

    int64_t k = 0;
    for (; k + P::kStep <= depth; k += P::kStep) {
#pragma GCC unroll 8
        for (int i = 0; i < kAhead; ++i) __builtin_prefetch(ahead + i * kLine, 0, 2);
        ahead += kAhead * kLine;
        typename P::XVec xs[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) xs[r] = P::load_x(rows[r] + k);
#pragma GCC unroll 8
        for (int n = 0; n < kOutputs; ++n) {
            const typename P::WVec weight = P::load_w(w + n * depth + k);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) acc[r][n] = P::madd(acc[r][n], xs[r], weight);
        }
    }
    if (k < depth) {
        const int64_t rest = depth - k;
        typename P::XVec xs[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) xs[r] = P::load_x_first(rows[r] + k, rest);
#pragma GCC unroll 8
        for (int n = 0; n < kOutputs; ++n) {
            const typename P::WVec weight = P::load_w_first(w + n * depth + k, rest);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) acc[r][n] = P::madd(acc[r][n], xs[r], weight);
        }
    }

#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < kOutputs; n += 4) {
            const auto none = P::zero();
            float sums[4];
            P::sum4(acc[r][n], n + 1 < kOutputs ? acc[r][n + 1] : none,
                    n + 2 < kOutputs ? acc[r][n + 2] : none,
                    n + 3 < kOutputs ? acc[r][n + 3] : none, sums);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                if (n + i < kOutputs) y[r * y_stride + n + i] = sums[i];
            }
        }
    }
}

// All rows over a panel of kOutputs weight rows; meanwhile what lies `ahead`, the next panel, is
// brought from memory, an equal share with each tile. Without this every panel would begin with a
// wait, for only its first tile reads from memory.
template <class P, int kOutputs, int kAhead>
inline void panel_tiles(const DotJob& job, const typename P::W* w, float* y, const char* ahead) {
    const int64_t share = job.depth / P::kStep * kAhead * kLine;
    int64_t r = 0;
    const auto tile = [&]<int kRows>() {
        dot_tile<P, kRows, kOutputs, kAhead>(job.x + r, w, job.depth, y + r * job.y_stride,
                                             job.y_stride, ahead);
        r += kRows;
        ahead += share;
    };
    while (r + P::kRows <= job.rows) tile.template operator()<P::kRows>();
    static_assert(P::kRows <= 4);
    const int64_t rest = job.rows - r;
    if constexpr (P::kRows > 3) {
        if (rest == 3) tile.template operator()<3>();
    }
    if constexpr (P::kRows > 2) {
        if (rest == 2) tile.template operator()<2>();
    }
    if (rest == 1) tile.template operator()<1>();
}

// Weights that only one tile of activations needs: memory is the limit, and one row after another
// at full stride is what it serves fastest.
template <class P>
inline void stream_rows(const DotJob& job, const typename P::W* w) {
    constexpr int64_t kDistance = 8192;  // bytes
    for (int64_t n = 0; n < job.outputs; ++n, w += job.depth) {
        panel_tiles<P, 1, 1>(job, w, job.y + n, reinterpret_cast<const char*>(w) + kDistance);
    }
}

template <class P>
inline void dot_block(const DotJob& job) {
    constexpr int kOutputs = P::kOutputs;
    constexpr int64_t kStepBytes = P::kStep * sizeof(typename P::W);
    constexpr int64_t kLines = kOutputs * kStepBytes / kLine;
    const auto* w = static_cast<const typename P::W*>(job.w);
    const int64_t tiles = (job.rows + P::kRows - 1) / P::kRows;
    if (kStepBytes == kLine && tiles == 1) return stream_rows<P>(job, w);
    int64_t n = 0;
    for (; n + kOutputs <= job.outputs; n += kOutputs, w += kOutputs * job.depth) {
        float* y = job.y + n;
        const auto* ahead = reinterpret_cast<const char*>(w + kOutputs * job.depth);
        if (tiles == 1 || !job.from_memory) {
            panel_tiles<P, kOutputs, 0>(job, w, y, ahead);
        } else if (tiles >= kLines) {
            panel_tiles<P, kOutputs, 1>(job, w, y, ahead);
        } else if (tiles * 2 >= kLines) {
            panel_tiles<P, kOutputs, 2>(job, w, y, ahead);
        } else {
            panel_tiles<P, kOutputs, 3>(job, w, y, ahead);
        }
    }
    for (; n < job.outputs; ++n, w += job.depth) {
        panel_tiles<P, 1, 0>(job, w, job.y + n, nullptr);
    }
}

// A product in 32-bit floats, of weights in any format.
template <class F, class Weight>
struct FloatProduct {
    using X = float;
    using W = Weight;
    using Acc = typename F::Vec;
    using XVec = typename F::Vec;
    using WVec = typename F::Vec;
    static constexpr int64_t kStep = F::kLanes;
    static constexpr int kRows = F::kTileRows;
    static constexpr int kOutputs = F::kTileOutputs;

    static Acc zero() { return F::splat(0.0f); }
    static XVec load_x(const float* p) { return F::load(p); }
    static XVec load_x_first(const float* p, int64_t n) { return F::load_first(p, n); }
    static WVec load_w(const Weight* p) { return F::load(p); }
    static WVec load_w_first(const Weight* p, int64_t n) { return F::load_first(p, n); }
    static Acc madd(Acc acc, XVec x, WVec w) { return F::fma(x, w, acc); }
    static void sum4(Acc a, Acc b, Acc c, Acc d, float* out) { F::sum4(a, b, c, d, out); }
};

template <class F>
inline void dot_any(DType weights, const DotJob& job) {
    switch (weights) {
        case DType::kBF16:
            return dot_block<FloatProduct<F, BF16>>(job);
        case DType::kF16:
            return dot_block<FloatProduct<F, F16>>(job);
        case DType::kF32:
            return dot_block<FloatProduct<F, float>>(job);
    }
}

}  // namespace
}  // namespace moeinf
