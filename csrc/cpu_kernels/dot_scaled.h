// The matrix product of weights with scales, written once over a `Product` type and compiled for
// each instruction set (included only by kernels_*.cpp; unnamed for the reason float_math.h gives).
//
//   y[r][n] = multiplier * sum over runs of scale * (sum over the run of x[r][k] * w[n][k])
//
// Weights are decoded in registers, from the bytes as they are stored. A step takes kStep columns
// of a row: one load, whose parts are decoded into kParts vectors. The columns of a part do not lie
// side by side; so the activations are arranged once, in the order of the parts, and padded with
// zeros to whole steps (arrange). Lane l of a sum always has the same kStep / lanes columns of each
// step. So a group of scales that is smaller than a step becomes one vector of scales. A run is
// some steps that share such a vector.
//
// Few activations take two weight rows at a time, some rows apart: memory is the limit, and two
// streams keep it busy while weights are decoded. Many activations share a panel of weight rows.
// The panel is decoded once, and tiles of kRows activations by its kOutputs rows read the decoded
// weights. The sum of a pair has the same order in both: parts of a step, steps of a run, runs of
// the depth, and lanes at the end.
//
// Zero points are subtracted from the integers, which leaves integers that are exact in bf16.
//
// Product: F, the Floats type; X, the activations' type; XVec, WVec, Packed registers; kStep;
// kParts; kHalves: 2 where even and odd parts have scales of their own, else 1; kOneScale: a run
// has one scale; kRows, kOutputs; load(row, k), load_first(row, k, n), n < kStep columns;
// decode<part>; load_x, load_w, store_w; madd(acc, x, w). With kZeros: Zero, made by zero(floats)
// of the zero points of a step's lanes; decode<part> takes it too. Zeroed is the product with
// kZeros. Scales: ScalesBeside, or ScalesInBlocks of dot_blocks.h.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "cpu_kernels/float_math.h"
#include "cpu_kernels/kernels.h"

namespace moeinf {
namespace {

constexpr int64_t kSpan = 128;  // the most columns of a run
constexpr int64_t kPrefetch = 8192;
constexpr int64_t kPanelBytes = 384 << 10;

// The scales of some weight rows as floats, and what all tiles over these rows share.
template <class P>
struct ScaledPanel {
    using F = typename P::F;
    const std::byte* w = nullptr;  // of the first row
    int64_t ahead = 0;             // bytes to the memory that is prefetched
    int64_t inverse = 0;           // of the columns that share a scale
    int32_t lanes[P::kHalves][F::kLanes];
    typename P::X* kept = nullptr;  // decoded rows of whole steps
    // A vector is read from any scale on.
    alignas(64) float scales[kScaleOutputs][kMaxScales + 64];
    alignas(64) float minima[P::kMinima ? kScaleOutputs : 1][P::kMinima ? kMaxScales + 64 : 1];
    alignas(64) float zeros[P::kZeros ? kScaleOutputs : 1][P::kZeros ? kMaxScales + 64 : 1];
};

struct NoZero {};

template <class P>
constexpr int64_t padded_depth(int64_t depth) {
    return (depth + P::kStep - 1) / P::kStep * P::kStep;
}

// Elements of an arranged row.
template <class P>
constexpr int64_t arranged_elements(int64_t depth) {
    if constexpr (requires { P::kStepBytes; }) {
        return padded_depth<P>(depth) / P::kStep * P::kStepBytes;
    } else {
        return padded_depth<P>(depth);
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

// Scales that lie beside the weights.
template <class P>
struct ScalesBeside {
    using F = typename P::F;
    static constexpr int kInverseBits = 40;

    static int64_t byte_at(int64_t k) { return k / P::kPack; }
    // The first scale of the run at column k: k / group.
    static int64_t scale_at(const ScaledPanel<P>& panel, int64_t k) {
        return k * panel.inverse >> kInverseBits;
    }
    // Steps of a run.
    static int64_t steps(const DotJob& job) {
        const int64_t group = job.how == nullptr ? 0 : job.how->block_cols;
        const int64_t span = group == 0 ? kSpan : std::min(group, kSpan);
        return std::max<int64_t>(1, (span > 32 && span < kSpan ? 32 : span) / P::kStep);
    }

    static void begin(const DotJob& job, ScaledPanel<P>& panel) {
        constexpr int64_t kCols = P::kStep / F::kLanes;  // of one lane in a step
        const int64_t group = job.how == nullptr ? 0 : job.how->block_cols;
        panel.inverse = group == 0 ? 0 : ((int64_t{1} << kInverseBits) + group - 1) / group;
        for (int64_t l = 0; l < F::kLanes; ++l) {
            panel.lanes[0][l] =
                group != 0 && group < P::kStep ? static_cast<int32_t>(l * kCols / group) : 0;
        }
    }

    // Asks for the scales of some rows, which no row of weights announces.
    static void prefetch(const DotJob& job, int64_t output, int64_t count) {
        if (job.how == nullptr || output >= job.outputs) return;
        const int64_t first = (job.first + output) / job.how->block_rows;
        const int64_t last =
            (job.first + std::min(output + count, job.outputs) - 1) / job.how->block_rows;
        const std::byte* from = job.scales + first * job.how->rows.stride;
        const std::byte* end = job.scales + (last + 1) * job.how->rows.stride;
        for (; from < end; from += 64) __builtin_prefetch(from, 0, 3);
    }

    // The scales of `count` rows from row `output` of the job.
    static void load(const DotJob& job, int64_t output, int count, ScaledPanel<P>& panel) {
        const int64_t scales = job.how == nullptr ? 1 : job.how->count(job.depth);
        for (int n = 0; n < count; ++n) {
            float* to = panel.scales[n];
            *to = 1;
            const int64_t row =
                job.how == nullptr ? 0 : (job.first + output + n) / job.how->block_rows;
            if (job.how != nullptr) {
                widen_scales<F>(job.scales + row * job.how->rows.stride, job.how->type, scales, to);
            }
            // Lanes beyond the depth have sums of zero; their scales must be numbers.
            F::store(to + scales, F::splat(0.0f));
            if constexpr (P::kZeros) {
                const std::byte* from = job.zeros + row * job.how->zeros->stride;
                widen_row<F>(reinterpret_cast<const int8_t*>(from), scales, panel.zeros[n]);
                F::store(panel.zeros[n] + scales, F::splat(0.0f));
            }
        }
    }
};

// A weight row as it is stored.
template <class P, class Scales>
struct StoredRow {
    const DotJob& job;
    const ScaledPanel<P>& panel;
    int n;
    typename P::F::Lanes lanes = P::F::lanes(panel.lanes[0]);
    const std::byte* w = panel.w + n * job.w_stride;
    typename P::Packed packed{};
    typename P::Zero zero{};

    template <int kSteps>
    [[gnu::always_inline]] void begin(int64_t k, int64_t scale) {
        const std::byte* at = w + Scales::byte_at(k) + panel.ahead;
        for (int64_t i = 0; i < Scales::byte_at(kSteps * P::kStep); i += 64) {
            __builtin_prefetch(at + i, 0, 2);
        }
        begin(scale);
    }
    [[gnu::always_inline]] void begin(int64_t scale) {
        if constexpr (P::kZeros) zero = P::zero(P::F::spread(panel.zeros[n] + scale, lanes));
    }
    template <bool kWhole>
    [[gnu::always_inline]] void load(int64_t k) {
        packed = kWhole || k + P::kStep <= job.depth ? P::load(w, k)
                                                     : P::load_first(w, k, job.depth - k);
    }
    template <size_t kPart>
    [[gnu::always_inline]] typename P::WVec part() const {
        if constexpr (P::kZeros) {
            return P::template decode<kPart>(packed, zero);
        } else {
            return P::template decode<kPart>(packed);
        }
    }
};

// Calls part<i>(column) for every kEach-th part of a step, from kFirst on.
template <class P, size_t kFirst, size_t kEach, class Part>
[[gnu::always_inline]] inline void for_parts(int64_t k, const Part& part) {
    constexpr int64_t kPart = P::kStep / static_cast<int64_t>(P::kParts);
    [&]<size_t... kIndex>(std::index_sequence<kIndex...>) __attribute__((always_inline)) {
        (part.template operator()<kFirst + kEach * kIndex>(
             k + static_cast<int64_t>(kFirst + kEach * kIndex) * kPart),
         ...);
    }(std::make_index_sequence<P::kParts / kEach>());
}

// Calls run<whole>(column) for all runs of kSteps steps.
template <class P, int kSteps, class Run>
[[gnu::always_inline]] inline void for_runs(int64_t end, const Run& run) {
    constexpr int64_t kColumns = kSteps * P::kStep;
    int64_t begin = 0;
    for (; begin + kColumns <= end; begin += kColumns) run.template operator()<true>(begin);
    if (begin < end) run.template operator()<false>(begin);
}

// Calls step(column) for all steps of a run.
template <class P, int kSteps, bool kWhole, class Step>
[[gnu::always_inline]] inline void for_steps(int64_t begin, int64_t end, const Step& step) {
    if constexpr (kWhole) {
#pragma GCC unroll 16
        for (int i = 0; i < kSteps; ++i) step(begin + i * P::kStep);
    } else {
        for (; begin < end; begin += P::kStep) step(begin);
    }
}

// Decodes rows into the panel.
template <class P, class Scales, int kSteps>
inline void keep(const DotJob& job, const ScaledPanel<P>& panel, int count) {
    for (int n = 0; n < count; ++n) {
        StoredRow<P, Scales> row{job, panel, n};
        auto* to = panel.kept + n * padded_depth<P>(job.depth);
        for_runs<P, kSteps>(job.depth, [&]<bool kWhole>(int64_t begin) {
            row.begin(Scales::scale_at(panel, begin));
            for_steps<P, kSteps, kWhole>(begin, job.depth, [&](int64_t k) {
                row.template load<kWhole>(k);
                for_parts<P, 0, 1>(k, [&]<size_t kIndex>(int64_t at) {
                    P::store_w(to + at, row.template part<kIndex>());
                });
            });
        });
    }
}

// kOutputs rows of a panel, `apart` rows apart, from row `first` on.
template <class P, class Scales, int kOutputs>
[[gnu::always_inline]] inline auto rows_apart(const DotJob& job, const ScaledPanel<P>& panel,
                                              int first, int apart) {
    using Row = StoredRow<P, Scales>;
    return [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
        return std::array<Row, kOutputs>{
            Row{job, panel, first + static_cast<int>(kIndex) * apart}...};
    }(std::make_index_sequence<static_cast<size_t>(kOutputs)>());
}

template <class F, int kRows, int kOutputs>
[[gnu::always_inline]] inline void clear(typename F::Vec (&sums)[kRows][kOutputs]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < kOutputs; ++n) sums[r][n] = F::splat(0.0f);
    }
}

// The sums of kRows activations by kOutputs rows of the panel, `apart` rows apart, from row `first`
// on; of kept rows, or of rows as they are stored.
template <class P, class Scales, int kSteps, int kRows, int kOutputs, bool kKept>
[[gnu::always_inline]] inline void sum_runs(const DotJob& job, const ScaledPanel<P>& panel,
                                            int first, int apart,
                                            const typename P::X* const (&x)[kRows],
                                            typename P::F::Vec (&acc)[kRows][kOutputs]) {
    using F = typename P::F;
    const int64_t padded = padded_depth<P>(job.depth);
    const typename P::X* kept = kKept ? panel.kept + first * padded : nullptr;
    auto row = rows_apart<P, Scales, kOutputs>(job, panel, first, apart);
    typename F::Lanes lanes[P::kHalves];
    for (int half = 0; half < P::kHalves; ++half) lanes[half] = F::lanes(panel.lanes[half]);
    clear<F>(acc);
    const auto run = [&]<bool kWhole>(int64_t from) __attribute__((always_inline)) {
        const int64_t scale = Scales::scale_at(panel, from);
        if constexpr (!kKept) {
#pragma GCC unroll 8
            for (int n = 0; n < kOutputs; ++n) row[n].template begin<kSteps>(from, scale);
        }
        typename F::Vec partial[kRows][kOutputs];
        const auto part = [&]<size_t kIndex>(int64_t at) __attribute__((always_inline)) {
            typename P::XVec xs[kRows];
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) xs[r] = P::load_x(x[r] + at);
#pragma GCC unroll 8
            for (int n = 0; n < kOutputs; ++n) {
                typename P::WVec w;
                if constexpr (kKept) {
                    w = P::load_w(kept + n * padded + at);
                } else {
                    w = row[n].template part<kIndex>();
                }
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) partial[r][n] = P::madd(partial[r][n], xs[r], w);
            }
        };
        const auto half_of_run = [&]<size_t kHalf>() __attribute__((always_inline)) {
            clear<F>(partial);
            const auto step = [&](int64_t k) __attribute__((always_inline)) {
                if constexpr (!kKept) {
#pragma GCC unroll 8
                    for (int n = 0; n < kOutputs; ++n) row[n].template load<kWhole>(k);
                }
                for_parts<P, kHalf, P::kHalves>(k, part);
            };
            for_steps<P, kSteps, kWhole>(from, job.depth, step);
#pragma GCC unroll 8
            for (int n = 0; n < kOutputs; ++n) {
                const float* at = panel.scales[first + n * apart] + scale;
                const auto factor = P::kOneScale ? F::splat(*at) : F::spread(at, lanes[kHalf]);
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    acc[r][n] = F::fma(factor, partial[r][n], acc[r][n]);
                }
            }
        };
        [&]<size_t... kHalf>(std::index_sequence<kHalf...>) __attribute__((always_inline)) {
            (half_of_run.template operator()<kHalf>(), ...);
        }(std::make_index_sequence<P::kHalves>());
    };
    for_runs<P, kSteps>(job.depth, run);
    if constexpr (P::kMinima) Scales::subtract_minima(job, panel, first, apart, x, acc);
}

// The sums of the lanes of a tile, times a multiplier.
template <class F, int kRows, int kOutputs>
inline void write_sums(const typename F::Vec (&acc)[kRows][kOutputs], const DotJob& job, float* y) {
    for (int r = 0; r < kRows; ++r) {
        const auto at = [&](int n) { return n < kOutputs ? acc[r][n] : F::splat(0.0f); };
        for (int n = 0; n < kOutputs; n += 4) {
            float sums[4];
            F::sum4(at(n), at(n + 1), at(n + 2), at(n + 3), sums);
            for (int i = 0; i < 4 && n + i < kOutputs; ++i) {
                y[r * job.y_stride + n + i] = sums[i] * job.multiplier;
            }
        }
    }
}

// Prefetches rows of weights, some lines at a time.
struct Ahead {
    const std::byte* row;
    int64_t stride;
    int64_t row_bytes;
    int64_t rows;
    int64_t share;  // lines at a time
    int64_t at = 0;

    void prefetch() {
        for (int64_t i = 0; i < share && rows > 0; ++i) {
            __builtin_prefetch(row + at, 0, 2);
            if ((at += 64) < row_bytes) continue;
            at = 0;
            row += stride;
            --rows;
        }
    }
};

// kRows activations from `r` on by kOutputs * kTimes rows of the panel from `n` on: kOutputs at a
// time, kTimes rows apart.
template <class P, class Scales, int kSteps, int kRows, int kOutputs, int kTimes, bool kKept>
inline void scaled_tile(const DotJob& job, const ScaledPanel<P>& panel, int64_t r, int n,
                        float* y) {
    using Vec = typename P::F::Vec;
    const typename P::X* x[kRows];
    for (int i = 0; i < kRows; ++i) x[i] = static_cast<const typename P::X*>(job.x[r + i]);
    Vec sums[kRows][kOutputs * kTimes];
    for (int i = 0; i < kTimes; ++i) {
        Vec acc[kRows][kOutputs];
        sum_runs<P, Scales, kSteps, kRows, kOutputs, kKept>(job, panel, n + i, kTimes, x, acc);
#pragma GCC unroll 8
        for (int j = 0; j < kRows; ++j) {
#pragma GCC unroll 8
            for (int k = 0; k < kOutputs; ++k) sums[j][i + k * kTimes] = acc[j][k];
        }
    }
    write_sums<typename P::F>(sums, job, y + r * job.y_stride + n);
}

// Few activations by `count` rows of weights, two rows at a time, so that memory reads two streams.
template <class P, class Scales, int kSteps>
inline void stored_rows(const DotJob& job, const ScaledPanel<P>& panel, int count, float* y) {
    constexpr int kTimes = kScaleOutputs / 2;
    int64_t r = 0;
    if (count == kScaleOutputs) {
        const auto tile = [&]<int kRows>() {
            scaled_tile<P, Scales, kSteps, kRows, 2, kTimes, false>(job, panel, r, 0, y);
            r += kRows;
        };
        while (r + P::kRows <= job.rows) tile.template operator()<P::kRows>();
        if (r + 2 <= job.rows) tile.template operator()<2>();
        if (r < job.rows) tile.template operator()<1>();
    }
    for (; r < job.rows; ++r) {
        for (int n = 0; n < count; ++n) {
            scaled_tile<P, Scales, kSteps, 1, 1, 1, false>(job, panel, r, n, y);
        }
    }
}

// All activations by `count` rows of weights, which are decoded first.
template <class P, class Scales, int kSteps>
inline void kept_rows(const DotJob& job, const ScaledPanel<P>& panel, int count, Ahead& ahead,
                      float* y) {
    keep<P, Scales, kSteps>(job, panel, count);
    int64_t r = 0;
    if (count == P::kOutputs) {
        const auto tile = [&]<int kRows>() {
            ahead.prefetch();
            scaled_tile<P, Scales, kSteps, kRows, P::kOutputs, 1, true>(job, panel, r, 0, y);
            r += kRows;
        };
        while (r + P::kRows <= job.rows) tile.template operator()<P::kRows>();
        while (r < job.rows) tile.template operator()<1>();
    }
    for (; r < job.rows; ++r) {
        for (int n = 0; n < count; ++n) {
            scaled_tile<P, Scales, kSteps, 1, 1, 1, true>(job, panel, r, n, y);
        }
    }
}

template <class P, class Scales, int kSteps>
inline void dot_runs(const DotJob& job) {
    static_assert(P::kOutputs <= kScaleOutputs && P::kRows <= 4);
    constexpr auto kMost = kPanelBytes / static_cast<int64_t>(sizeof(typename P::X));
    ScaledPanel<P> panel;
    Scales::begin(job, panel);
    alignas(64) typename P::X kept[kMost];
    if (job.rows > P::kRows && P::kOutputs * padded_depth<P>(job.depth) <= kMost) panel.kept = kept;
    const int step = panel.kept == nullptr ? kScaleOutputs : P::kOutputs;
    // Whole panels: fewer bytes could lie in this panel, whose other rows are being read already.
    const int64_t row_bytes = Scales::byte_at(job.depth);
    panel.ahead = (kPrefetch / (step * row_bytes + 1) + 1) * step * job.w_stride;
    const int64_t lines = step * ((row_bytes + 63) / 64);
    const int64_t tiles = (job.rows + P::kRows - 1) / P::kRows;
    panel.w = job.w;
    if (job.from_memory) {  // nothing has prefetched the first panel
        Scales::prefetch(job, 0, step);
        Ahead{job.w, job.w_stride, row_bytes, std::min<int64_t>(step, job.outputs), lines}
            .prefetch();
    }
    for (int64_t n = 0; n < job.outputs; n += step, panel.w += step * job.w_stride) {
        const auto count = static_cast<int>(std::min<int64_t>(step, job.outputs - n));
        Scales::prefetch(job, n + step, step);  // of the next panel
        Scales::load(job, n, count, panel);
        if (panel.kept == nullptr) {
            stored_rows<P, Scales, kSteps>(job, panel, count, job.y + n);
            continue;
        }
        // The tiles of this panel prefetch the next one.
        Ahead ahead{panel.w + step * job.w_stride, job.w_stride, row_bytes, step,
                    (lines + tiles - 1) / tiles};
        kept_rows<P, Scales, kSteps>(job, panel, count, ahead, job.y + n);
    }
}

// A run has the columns of a scale, at most kSpan.
template <class P, class Scales = ScalesBeside<P>>
inline void dot_scaled(const DotJob& job) {
    constexpr int kMost = std::max(1, static_cast<int>(kSpan / P::kStep));
    constexpr int kSome = std::max(1, static_cast<int>(32 / P::kStep));
    const int64_t steps = Scales::steps(job);
    if (kMost > 1 && steps == kMost) return dot_runs<P, Scales, kMost>(job);
    if (kSome > 1 && steps == kSome) return dot_runs<P, Scales, kSome>(job);
    dot_runs<P, Scales, 1>(job);
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
    static constexpr bool kBytes =
        requires { F::template byte<0>(typename F::Words{}, typename Decoder::Stored{}); };
    static constexpr bool kWords = kNibbles || kBytes;  // which parts are cut from
    static constexpr size_t kParts = kNibbles ? 8 : kBytes ? 4 : 1;
    static constexpr int64_t kStep = static_cast<int64_t>(kParts) * F::kLanes;
    static constexpr int kHalves = 1;
    static constexpr bool kOneScale = false;
    static constexpr int kRows = F::kTileRows;
    static constexpr int kOutputs = 4;

    static auto load(const std::byte* row, int64_t k) {
        if constexpr (kWords) {
            return F::load_words(row + k / kPack);
        } else {
            return F::load(reinterpret_cast<const typename Decoder::Stored*>(row) + k);
        }
    }
    static auto load_first(const std::byte* row, int64_t k, int64_t n) {
        if constexpr (kWords) {
            return F::load_words_first(row + k / kPack, n / kPack);
        } else {
            return F::load_first(reinterpret_cast<const typename Decoder::Stored*>(row) + k, n);
        }
    }
    using Packed = decltype(load(nullptr, 0));
    template <size_t kPart>
    static WVec decode(Packed packed) {
        if constexpr (kNibbles) {
            return F::template look_up<4 * static_cast<int>(kPart)>(packed, Decoder::kTable);
        } else if constexpr (kBytes) {
            return F::template byte<kPart>(packed, typename Decoder::Stored{});
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
