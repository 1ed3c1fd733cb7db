// The matrix product of weights without scales, written once over a `Product` type and compiled for
// each instruction set (included only by kernels_*.cpp; unnamed for the reason float_math.h gives).
//
// The depth is contiguous in both operands, so no packing is needed. A tile of kRows activations by
// kOutputs weight rows keeps one vector of partial sums for each pair, walks the depth once, and
// adds the lanes at the end. A loaded weight vector serves kRows products, an activation vector
// kOutputs. The weight rows of a tile stay in the L1 cache while all activations use them. The sum
// of a pair has the same order in every tile shape.
//
// Product: Weights, the decoder (formats/plain.h); X, the activations' type; Acc, XVec, WVec
// registers; kStep elements of depth at a time; kRows, kOutputs; load_x(p), load_w(row, k);
// load_x_first, load_w_first (n < kStep elements, rest zero); madd(acc, x, w); zero();
// sum4(a, b, c, d, out): the four sums of lanes.
#pragma once

#include "cpu_kernels/kernels.h"

namespace moeinf {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line

// Adds the products of the whole depth. Inlined, so the sums stay in registers. Each step also
// prefetches kAhead cache lines at `ahead`, which moves along with the depth.
template <class P, int kRows, int kOutputs, int kAhead>
[[gnu::always_inline]] inline void walk(const typename P::X* const (&rows)[kRows],
                                        const typename P::Weights::Stored* w, int64_t stride,
                                        int64_t depth, const char* ahead,
                                        typename P::Acc (&acc)[kRows][kOutputs]) {
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
            const typename P::WVec weight = P::load_w(w + n * stride, k);
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
            const typename P::WVec weight = P::load_w_first(w + n * stride, k, rest);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) acc[r][n] = P::madd(acc[r][n], xs[r], weight);
        }
    }
}

// kRows rows of activations from x, by kOutputs rows of weights from w. Prefetches the memory at
// `ahead` on the way.
template <class P, int kRows, int kOutputs, int kAhead = 0>
inline void dot_tile(const DotJob& job, const void* const* x, const typename P::Weights::Stored* w,
                     int64_t stride, float* y, const char* ahead = nullptr) {
    typename P::Acc acc[kRows][kOutputs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < kOutputs; ++n) acc[r][n] = P::zero();
    }
    const typename P::X* rows[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) rows[r] = static_cast<const typename P::X*>(x[r]);

    walk<P, kRows, kOutputs, kAhead>(rows, w, stride, job.depth, ahead, acc);

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
                if (n + i < kOutputs) y[r * job.y_stride + n + i] = sums[i];
            }
        }
    }
}

// All rows over a panel of kOutputs weight rows. Each tile also prefetches an equal share of the
// next panel, which begins at `ahead`. Without this every panel would begin with a wait, because
// only its first tile reads from memory.
template <class P, int kOutputs, int kAhead>
inline void panel_tiles(const DotJob& job, const typename P::Weights::Stored* w, int64_t stride,
                        float* y, const char* ahead) {
    const int64_t share = job.depth / P::kStep * kAhead * kLine;
    int64_t r = 0;
    const auto tile = [&]<int kRows>() {
        dot_tile<P, kRows, kOutputs, kAhead>(job, job.x + r, w, stride, y + r * job.y_stride,
                                             ahead);
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

template <class P>
constexpr int64_t step_bytes() {
    using W = typename P::Weights;
    return P::kStep / W::kPack * static_cast<int64_t>(sizeof(typename W::Stored));
}

// For weights that only one tile of activations needs. Memory is the limit, and it is fastest for
// one row after another. If rows of another matrix lie between, the prefetch distance is a number
// of whole rows.
template <class P>
inline void stream_rows(const DotJob& job, const typename P::Weights::Stored* w, int64_t stride) {
    int64_t distance = 8192;  // bytes
    const int64_t row = job.depth / P::kStep * step_bytes<P>();
    if (job.w_stride >= 2 * row) distance = (distance / (row + 1) + 1) * job.w_stride;
    for (int64_t n = 0; n < job.outputs; ++n, w += stride) {
        panel_tiles<P, 1, 1>(job, w, stride, job.y + n,
                             reinterpret_cast<const char*>(w) + distance);
    }
}

template <class P>
inline void dot_block(const DotJob& job) {
    using Stored = typename P::Weights::Stored;
    constexpr int kOutputs = P::kOutputs;
    constexpr int64_t kLines = kOutputs * step_bytes<P>() / kLine;
    const auto* w = reinterpret_cast<const Stored*>(job.w);
    const int64_t stride = job.w_stride / static_cast<int64_t>(sizeof(Stored));
    const int64_t tiles = (job.rows + P::kRows - 1) / P::kRows;
    if (step_bytes<P>() == kLine && tiles == 1) return stream_rows<P>(job, w, stride);
    int64_t n = 0;
    for (; n + kOutputs <= job.outputs; n += kOutputs, w += kOutputs * stride) {
        const auto* ahead = reinterpret_cast<const char*>(w + kOutputs * stride);
        if (tiles == 1 || !job.from_memory) {
            panel_tiles<P, kOutputs, 0>(job, w, stride, job.y + n, ahead);
        } else if (tiles >= kLines) {
            panel_tiles<P, kOutputs, 1>(job, w, stride, job.y + n, ahead);
        } else if (tiles * 2 >= kLines) {
            panel_tiles<P, kOutputs, 2>(job, w, stride, job.y + n, ahead);
        } else {
            panel_tiles<P, kOutputs, 3>(job, w, stride, job.y + n, ahead);
        }
    }
    for (; n < job.outputs; ++n, w += stride) {
        panel_tiles<P, 1, 0>(job, w, stride, job.y + n, nullptr);
    }
}

// A product in 32-bit floats, of weights in any format without scales.
template <class F, class Decoder>
struct FloatProduct {
    using Weights = Decoder;
    using X = float;
    using Acc = typename F::Vec;
    using XVec = typename F::Vec;
    using WVec = typename F::Vec;
    static constexpr int64_t kStep = F::kLanes;
    static constexpr int kRows = F::kTileRows;
    static constexpr int kOutputs = F::kTileOutputs;

    static Acc zero() { return F::splat(0.0f); }
    static XVec load_x(const float* p) { return F::load(p); }
    static XVec load_x_first(const float* p, int64_t n) { return F::load_first(p, n); }
    static WVec load_w(const typename Decoder::Stored* row, int64_t k) { return F::load(row + k); }
    static WVec load_w_first(const typename Decoder::Stored* row, int64_t k, int64_t n) {
        return F::load_first(row + k, n);
    }
    static Acc madd(Acc acc, XVec x, WVec w) { return F::fma(x, w, acc); }
    static void sum4(Acc a, Acc b, Acc c, Acc d, float* out) { F::sum4(a, b, c, d, out); }
};

}  // namespace
}  // namespace moeinf
