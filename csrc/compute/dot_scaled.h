// The matrix product of weights with scales, written once over a `Product` type and compiled for
// each instruction set (included only by kernels_*.cpp; unnamed for the reason float_math.h gives).
//
//   y[r][n] = multiplier * sum over spans of scale * (sum over the span of x[r][k] * w[n][k])
//
// Weights are decoded in registers, from the bytes as they are stored. A step takes kStep columns
// of a row: one load, whose parts are decoded into kParts vectors. The columns of a part do not lie
// side by side; so the activations are arranged once, in the order of the parts, and padded with
// zeros to whole steps (arrange). Lane l of a sum always has the same kStep / lanes columns of each
// step. So a group of scales that is smaller than a step becomes one vector of scales.
//
// The sum of a pair has the same order in every tile shape: parts of a step, steps of a span, spans
// of the depth, and lanes at the end. Where many activations share a panel of weight rows, the
// first tile of them keeps the decoded weights, and the other tiles read those.
//
// Zero points are subtracted from the integers, which leaves integers that are exact in bf16.
//
// Product: F, the Floats type; X, the activations' type; XVec, WVec, Packed registers; kStep;
// kParts; kRows, kOutputs; load(row, k), load_first(row, k, n), n < kStep columns; decode<part>;
// load_x, load_w, store_w; madd(acc, x, w). With kZeros: Zero, made by zero(floats) of the zero
// points of a step's lanes; decode<part> takes it too. Zeroed is the product with kZeros.
#pragma once

#include <utility>

#include "compute/float_math.h"
#include "compute/kernels.h"

namespace moeinf {
namespace {

constexpr int64_t kSpan = 128;  // the most columns whose products share one scale at a time
constexpr int64_t kPrefetch = 8192;
constexpr int64_t kPanelBytes = 384 << 10;

// Where the weights of a tile come from.
enum class From { kStored, kStoredAndKept, kPanel };

// The scales of some weight rows as floats, and what all tiles over these rows share.
template <class P>
struct ScaledPanel {
    using F = typename P::F;
    const std::byte* w = nullptr;  // of the first row
    int64_t ahead = 0;             // bytes to the memory that is prefetched
    int64_t group = 0;             // columns that share a scale
    int64_t span = 0;
    int32_t lanes[2][F::kLanes];    // the second ones only where parts have scales of their own
    typename P::X* kept = nullptr;  // decoded rows of whole steps
    // A vector is read from any scale on.
    alignas(64) float scales[kScaleOutputs][kMaxScales + 64];
    alignas(64) float minima[P::kMinima ? kScaleOutputs : 1][P::kMinima ? kMaxScales + 64 : 1];
    alignas(64) float zeros[P::kZeros ? kScaleOutputs : 1][P::kZeros ? kMaxScales + 64 : 1];
};

template <class P>
constexpr int64_t padded_depth(int64_t depth) {
    return (depth + P::kStep - 1) / P::kStep * P::kStep;
}

// The sums of the lanes of a tile, times a multiplier.
template <class F, int kRows, int kOutputs>
inline void write_sums(const typename F::Vec (&acc)[kRows][kOutputs], float multiplier,
                       int64_t stride, float* y) {
    for (int r = 0; r < kRows; ++r) {
        for (int n = 0; n < kOutputs; n += 4) {
            const auto none = F::splat(0.0f);
            float sums[4];
            F::sum4(acc[r][n], n + 1 < kOutputs ? acc[r][n + 1] : none,
                    n + 2 < kOutputs ? acc[r][n + 2] : none,
                    n + 3 < kOutputs ? acc[r][n + 3] : none, sums);
            for (int i = 0; i < 4 && n + i < kOutputs; ++i) {
                y[r * stride + n + i] = sums[i] * multiplier;
            }
        }
    }
}

template <class F>
inline void widen_scales(const std::byte* from, ScaleType type, int64_t count, float* to) {
    switch (type) {
        case ScaleType::kF32:
            return widen_row<F>(reinterpret_cast<const float*>(from), count, to);
        case ScaleType::kBF16:
            return widen_row<F>(reinterpret_cast<const BF16*>(from), count, to);
        case ScaleType::kF16:
            return widen_row<F>(reinterpret_cast<const F16*>(from), count, to);
        case ScaleType::kE8M0:
            return widen_row<F>(reinterpret_cast<const E8M0*>(from), count, to);
        case ScaleType::kE4M3:
            return widen_row<F>(reinterpret_cast<const E4M3*>(from), count, to);
    }
}

// What does not change from row to row.
template <class P>
inline void begin_panels(const DotJob& job, ScaledPanel<P>& panel) {
    constexpr int64_t kCols = P::kStep / P::F::kLanes;  // of one lane in a step
    const bool grouped = job.how != nullptr && job.how->block_cols != 0;
    panel.group = grouped ? job.how->block_cols : job.depth;
    panel.span = !grouped || panel.group > kSpan ? kSpan : panel.group;
    if (panel.span < P::kStep) panel.span = P::kStep;
    for (int64_t l = 0; l < P::F::kLanes; ++l) {
        panel.lanes[0][l] =
            panel.group < P::kStep ? static_cast<int32_t>(l * kCols / panel.group) : 0;
    }
}

// The scales of `count` rows from row `output` of the job.
template <class P>
inline void load_scales(const DotJob& job, int64_t output, int count, ScaledPanel<P>& panel) {
    using F = typename P::F;
    const int64_t scales = job.how == nullptr ? 1 : job.how->count(job.depth);
    for (int n = 0; n < count; ++n) {
        float* to = panel.scales[n];
        if (job.how == nullptr) {
            *to = 1;
        } else {
            const int64_t row = (job.first + output + n) / job.how->block_rows;
            if (n > 0 && row == (job.first + output + n - 1) / job.how->block_rows) {
                for (int64_t i = 0; i < scales; ++i) to[i] = panel.scales[n - 1][i];
            } else {
                widen_scales<F>(job.scales + row * job.how->rows.stride, job.how->type, scales, to);
            }
        }
        // Lanes beyond the depth have sums of zero; their scales must be numbers.
        F::store(to + scales, F::splat(0.0f));
        if constexpr (P::kZeros) {
            const int64_t row = (job.first + output + n) / job.how->block_rows;
            const std::byte* from = job.zeros + row * job.how->zeros->stride;
            widen_row<F>(reinterpret_cast<const int8_t*>(from), scales, panel.zeros[n]);
            F::store(panel.zeros[n] + scales, F::splat(0.0f));
        }
    }
}

// kRows rows of activations by kOutputs rows of weights.
template <class P, int kRows, int kOutputs, From kFrom>
inline void scaled_tile(const DotJob& job, const ScaledPanel<P>& panel, const void* const* x,
                        float* y) {
    using F = typename P::F;
    using X = typename P::X;
    constexpr int64_t kPart = P::kStep / P::kParts;
    const int64_t padded = padded_depth<P>(job.depth);
    const auto lanes = F::lanes(panel.lanes[0]);
    typename F::Vec acc[kRows][kOutputs];
    typename F::Vec partial[kRows][kOutputs];
    const X* rows[kRows];
    for (int r = 0; r < kRows; ++r) {
        rows[r] = static_cast<const X*>(x[r]);
        for (int n = 0; n < kOutputs; ++n) acc[r][n] = F::splat(0.0f);
    }

    typename P::Zero zeros[kOutputs];
    const auto step = [&](int64_t k, const auto& load) __attribute__((always_inline)) {
        typename P::Packed packed[kOutputs];
        if constexpr (kFrom != From::kPanel) {
#pragma GCC unroll 8
            for (int n = 0; n < kOutputs; ++n) packed[n] = load(panel.w + n * job.w_stride);
        }
        const auto part = [&]<size_t kIndex>() __attribute__((always_inline)) {
            const int64_t at = k + static_cast<int64_t>(kIndex) * kPart;
            typename P::XVec xs[kRows];
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) xs[r] = P::load_x(rows[r] + at);
#pragma GCC unroll 8
            for (int n = 0; n < kOutputs; ++n) {
                typename P::WVec w;
                if constexpr (kFrom == From::kPanel) {
                    w = P::load_w(panel.kept + n * padded + at);
                } else if constexpr (P::kZeros) {
                    w = P::template decode<kIndex>(packed[n], zeros[n]);
                } else {
                    w = P::template decode<kIndex>(packed[n]);
                }
                if constexpr (kFrom == From::kStoredAndKept) {
                    P::store_w(panel.kept + n * padded + at, w);
                }
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) partial[r][n] = P::madd(partial[r][n], xs[r], w);
            }
        };
        [&]<size_t... kIndex>(std::index_sequence<kIndex...>) __attribute__((always_inline)) {
            (part.template operator()<kIndex>(), ...);
        }(std::make_index_sequence<P::kParts>());
    };

    int64_t scale = 0;  // of `begin`: its index in a row of scales
    for (int64_t begin = 0; begin < job.depth; begin += panel.span) {
        const int64_t end = begin + panel.span < job.depth ? begin + panel.span : job.depth;
        if constexpr (kFrom != From::kPanel) {
            for (int64_t k = begin; k < end; k += P::kLineCols) {
#pragma GCC unroll 8
                for (int n = 0; n < kOutputs; ++n) {
                    __builtin_prefetch(panel.w + n * job.w_stride + k / P::kPack + panel.ahead, 0,
                                       2);
                }
            }
        }
        if constexpr (P::kZeros && kFrom != From::kPanel) {
            for (int n = 0; n < kOutputs; ++n) {
                zeros[n] = P::zero(F::spread(panel.zeros[n] + scale, lanes));
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
            for (int n = 0; n < kOutputs; ++n) partial[r][n] = F::splat(0.0f);
        }
        int64_t k = begin;
        for (; k + P::kStep <= end; k += P::kStep) {
            step(k, [&](const std::byte* row) { return P::load(row, k); });
        }
        if (k < end) {
            step(k, [&](const std::byte* row) { return P::load_first(row, k, end - k); });
        }
#pragma GCC unroll 8
        for (int n = 0; n < kOutputs; ++n) {
            const auto scales = F::spread(panel.scales[n] + scale, lanes);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) acc[r][n] = F::fma(scales, partial[r][n], acc[r][n]);
        }
        scale = end / panel.group;
    }
    write_sums<F, kRows, kOutputs>(acc, job.multiplier, job.y_stride, y);
}

// How the loops below compute one tile of a product with scales beside the weights.
template <class P>
struct ScaledTiles {
    static int64_t row_bytes(int64_t depth) { return (depth + P::kPack - 1) / P::kPack; }
    static void begin(const DotJob& job, ScaledPanel<P>& panel) { begin_panels<P>(job, panel); }
    static void load_scales(const DotJob& job, int64_t output, int count, ScaledPanel<P>& panel) {
        moeinf::load_scales<P>(job, output, count, panel);
    }
    template <int kRows, int kOutputs, From kFrom>
    static void tile(const DotJob& job, const ScaledPanel<P>& panel, const void* const* x,
                     float* y) {
        scaled_tile<P, kRows, kOutputs, kFrom>(job, panel, x, y);
    }
};

// All activations by kOutputs rows of weights.
template <class P, class Tiles, int kOutputs>
inline void scaled_panel(const DotJob& job, const ScaledPanel<P>& panel, float* y) {
    int64_t r = 0;
    const auto tiles = [&]<From kFrom>(int64_t end) {
        for (; r + P::kRows <= end; r += P::kRows) {
            Tiles::template tile<P::kRows, kOutputs, kFrom>(job, panel, job.x + r,
                                                            y + r * job.y_stride);
        }
    };
    const auto last = [&]<int kRows, From kFrom>() {
        Tiles::template tile<kRows, kOutputs, kFrom>(job, panel, job.x + r, y + r * job.y_stride);
        r += kRows;
    };
    if (panel.kept != nullptr && job.rows >= 2 * P::kRows) {
        tiles.template operator()<From::kStoredAndKept>(P::kRows);
        tiles.template operator()<From::kPanel>(job.rows);
        while (r < job.rows) last.template operator()<1, From::kPanel>();
        return;
    }
    tiles.template operator()<From::kStored>(job.rows);
    if (job.rows - r >= 2) last.template operator()<2, From::kStored>();
    if (job.rows - r == 1) last.template operator()<1, From::kStored>();
}

template <class P, class Tiles = ScaledTiles<P>>
inline void dot_scaled(const DotJob& job) {
    constexpr int kOutputs = P::kOutputs;
    static_assert(kOutputs <= kScaleOutputs && P::kRows <= 4);
    ScaledPanel<P> panel;
    Tiles::begin(job, panel);
    const int64_t padded = padded_depth<P>(job.depth);
    const int64_t row_bytes = Tiles::row_bytes(job.depth);
    alignas(64) typename P::X kept[kPanelBytes / sizeof(typename P::X)];
    if (kOutputs * padded <= kPanelBytes / static_cast<int64_t>(sizeof(typename P::X))) {
        panel.kept = kept;
    }
    panel.w = job.w;
    // Whole panels: fewer bytes could lie in this panel, whose other rows are being read already.
    panel.ahead = (kPrefetch / (kOutputs * row_bytes + 1) + 1) * kOutputs * job.w_stride;
    int64_t n = 0;
    for (; n + kOutputs <= job.outputs; n += kOutputs, panel.w += kOutputs * job.w_stride) {
        Tiles::load_scales(job, n, kOutputs, panel);
        scaled_panel<P, Tiles, kOutputs>(job, panel, job.y + n);
    }
    for (; n < job.outputs; ++n, panel.w += job.w_stride) {
        Tiles::load_scales(job, n, 1, panel);
        scaled_panel<P, Tiles, 1>(job, panel, job.y + n);
    }
}

// The activations of one row in the order of a product's parts, padded to whole steps.
template <class P>
inline void arrange(const void* from, int64_t count, void* to) {
    using X = typename P::X;
    constexpr int64_t kPart = P::kStep / P::kParts;
    constexpr auto kParts = static_cast<int64_t>(P::kParts);
    const auto* x = static_cast<const X*>(from);
    auto* out = static_cast<X*>(to);
    int64_t k = 0;
    for (; k + P::kStep <= count; k += P::kStep) {
        for (int64_t part = 0; part < kParts; ++part) {
            for (int64_t j = 0; j < kPart; ++j) {
                out[k + part * kPart + j] = x[k + kParts * j + part];
            }
        }
    }
    for (int64_t at = k; k < count && at < k + P::kStep; ++at) {
        const int64_t part = (at - k) / kPart;
        const int64_t column = k + (at - k) % kPart * kParts + part;
        out[at] = column < count ? x[column] : X{};
    }
}

template <class P>
void dot_with_or_without_zeros(const DotJob& job) {
    if (job.zeros == nullptr) return dot_scaled<P>(job);
    dot_scaled<typename P::Zeroed>(job);
}

template <class P>
constexpr Product scaled_product() {
    if constexpr (requires { typename P::Zeroed; }) {
        return {dot_with_or_without_zeros<P>, arrange<P>, P::kStep};
    } else {
        return {dot_scaled<P>, arrange<P>, P::kStep};
    }
}

struct NoZero {};

template <class P>
struct ZeroedFloatProduct;

// A product in 32-bit floats, of weights in any format with scales.
template <class Floats, class Decoder>
struct ScaledFloatProduct {
    using F = Floats;
    using X = float;
    using XVec = typename F::Vec;
    using WVec = typename F::Vec;
    using Zero = NoZero;
    static constexpr bool kZeros = false;
    static constexpr bool kMinima = false;
    static constexpr bool kNibbles = Decoder::kPack == 2;
    static constexpr int64_t kPack = Decoder::kPack;
    static constexpr size_t kParts = kNibbles ? 8 : 1;
    static constexpr int64_t kStep = static_cast<int64_t>(kParts) * F::kLanes;
    static constexpr int64_t kLineCols = kPack * 64;
    static constexpr int kRows = F::kTileRows;
    static constexpr int kOutputs = 4;

    static auto load(const std::byte* row, int64_t k) {
        if constexpr (kNibbles) {
            return F::load_words(row + k / 2);
        } else {
            return F::load(reinterpret_cast<const typename Decoder::Stored*>(row) + k);
        }
    }
    static auto load_first(const std::byte* row, int64_t k, int64_t n) {
        if constexpr (kNibbles) {
            return F::load_words_first(row + k / 2, n / 2);
        } else {
            return F::load_first(reinterpret_cast<const typename Decoder::Stored*>(row) + k, n);
        }
    }
    using Packed = decltype(load(nullptr, 0));
    template <size_t kPart>
    static WVec decode(Packed packed) {
        if constexpr (kNibbles) {
            return F::template look_up<4 * static_cast<int>(kPart)>(packed, Decoder::kTable);
        } else {
            return packed;
        }
    }
    static XVec load_x(const float* p) { return F::load(p); }
    static WVec load_w(const float* p) { return F::load(p); }
    static void store_w(float* p, WVec w) { F::store(p, w); }
    static typename F::Vec madd(typename F::Vec acc, XVec x, WVec w) { return F::fma(x, w, acc); }
};

template <class Floats, class Decoder>
struct IntegerFloatProduct : ScaledFloatProduct<Floats, Decoder> {
    using Zeroed = ZeroedFloatProduct<ScaledFloatProduct<Floats, Decoder>>;
};

template <class P>
struct ZeroedFloatProduct : P {
    using Zero = typename P::F::Vec;
    static constexpr bool kZeros = true;
    static Zero zero(Zero zeros) { return zeros; }
    template <size_t kPart>
    static typename P::WVec decode(typename P::Packed packed, Zero zero) {
        return P::F::sub(P::template decode<kPart>(packed), zero);
    }
};

}  // namespace
}  // namespace moeinf
