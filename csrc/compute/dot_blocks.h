// The matrix product of weights in blocks that have their own scales (compute/formats/ggml.h).
// The order of a sum is that of dot_scaled.h, whose loops over tiles and panels this file shares.
//
//   y[r][n] = sum over steps, halves of scale * (sum over the half of x[r][k] * code[n][k])
//             - sum over groups of minimum * (sum over the group of x[r][k])
//
// A step takes the codes of kStep columns. Where a byte has two codes, the lower halves of the
// bytes of a step belong to other groups of columns than the upper halves: each half has scales of
// its own. The sums of the activations of each group are made once, beside the arranged row.
#pragma once

#include "compute/dot_scaled.h"
#include "compute/formats/ggml.h"

namespace moeinf {
namespace {

// Codes of four bits, and where there are more bits, those.
template <class F, int kHighBits>
struct Codes {
    typename F::Words codes;
    typename F::Words high;
};
template <class F>
struct Codes<F, 0> {
    typename F::Words codes;
};

// What the products of one decoder share. kWord: bytes of the words that parts are cut from.
template <class Floats, class D, int64_t kWord>
struct NibbleBlocks {
    using F = Floats;
    using Decoder = D;
    using Packed = Codes<F, D::kHighBits>;
    static constexpr int64_t kBytes = 4 * F::kLanes;  // of codes in a step
    static constexpr int64_t kStep = 2 * kBytes;
    static constexpr size_t kParts = 2 * kWord;
    static constexpr bool kMinima = D::kMinima;
    static constexpr bool kZeros = false;
    static constexpr int kHalves = 2;

    // Position in an arranged row -> column.
    static int64_t column(int64_t position) {
        constexpr int64_t kPart = kStep / static_cast<int64_t>(kParts);
        const int64_t within = position % kStep;
        const int64_t part = within / kPart;
        const int64_t byte = position / kStep * kBytes + within % kPart * kWord + part / 2;
        return byte / D::kCodes * D::kPack + D::column(byte % D::kCodes, part % 2);
    }
    static Packed load(const std::byte* row, int64_t k) {
        constexpr auto kSize = static_cast<int64_t>(sizeof(typename D::Stored));
        const int64_t byte = k / 2;
        const std::byte* block = row + byte / D::kCodes * kSize;
        if constexpr (D::kCodes == 16 && D::kHighBits != 0) {
            return {F::load_quarters(block + D::kFirst, kSize),
                    F::load_bits(block + D::kHigh, kSize, 4)};
        } else if constexpr (D::kCodes == 16) {
            return {F::load_quarters(block + D::kFirst, kSize)};
        } else if constexpr (D::kHighBits == 0) {
            return {F::load_words(block + D::kFirst + byte % D::kCodes)};
        } else {
            const int64_t at = byte % D::kCodes;
            return {F::load_words(block + D::kFirst + at),
                    F::load_shifted(block + D::kHigh + D::high_byte(at), D::high_shift(at))};
        }
    }
    // Blocks of 256 columns end with a step.
    static Packed load_first(const std::byte* row, int64_t k, int64_t n) {
        constexpr auto kSize = static_cast<int64_t>(sizeof(typename D::Stored));
        if constexpr (D::kCodes == 16) {
            const std::byte* block = row + k / D::kPack * kSize;
            const auto codes = F::load_quarters_first(block + D::kFirst, kSize, n / D::kPack);
            if constexpr (D::kHighBits == 0) {
                return {codes};
            } else {
                return {codes, F::load_bits(block + D::kHigh, kSize, n / D::kPack)};
            }
        } else {
            return load(row, k);
        }
    }
};

template <class Floats, class D>
struct BlockFloatProduct : NibbleBlocks<Floats, D, 4> {
    using Base = NibbleBlocks<Floats, D, 4>;
    using F = Floats;
    using X = float;
    using XVec = typename F::Vec;
    using WVec = typename F::Vec;
    static constexpr int kRows = F::kTileRows;
    static constexpr int kOutputs = 4;

    template <size_t kPart>
    static WVec decode(const typename Base::Packed& packed) {
        constexpr int kAt = static_cast<int>(kPart);
        const auto low = F::template look_up<4 * kAt>(packed.codes, D::kTable);
        if constexpr (D::kHighBits == 0) {
            return low;
        } else {
            constexpr int kShift = 8 * (kAt / 2) + D::kHalfShift * (kAt % 2);
            return F::add(low, F::template look_up<kShift>(packed.high, D::kHighTable));
        }
    }
    static XVec load_x(const float* p) { return F::load(p); }
    static WVec load_w(const float* p) { return F::load(p); }
    static void store_w(float* p, WVec w) { F::store(p, w); }
    static typename F::Vec madd(typename F::Vec acc, XVec x, WVec w) { return F::fma(x, w, acc); }
};

// Codes of eight bits: a step is a block.
template <class Floats>
struct ByteBlocksProduct {
    using F = Floats;
    using Decoder = Q80Weights;
    using X = float;
    using XVec = typename F::Vec;
    using WVec = typename F::Vec;
    using Packed = const int8_t*;
    static constexpr int64_t kStep = 32;
    static constexpr size_t kParts = 32 / F::kLanes;
    static constexpr bool kMinima = false;
    static constexpr bool kZeros = false;
    static constexpr int kHalves = 1;
    static constexpr int kRows = F::kTileRows;
    static constexpr int kOutputs = 4;

    static int64_t column(int64_t position) { return position; }
    static Packed load(const std::byte* row, int64_t k) {
        return reinterpret_cast<const int8_t*>(row + k / 32 * 34 + 2);
    }
    static Packed load_first(const std::byte* row, int64_t k, int64_t /*n*/) {
        return load(row, k);
    }
    template <size_t kPart>
    static WVec decode(Packed packed) {
        return F::load(packed + static_cast<int64_t>(kPart) * F::kLanes);
    }
    static XVec load_x(const float* p) { return F::load(p); }
    static WVec load_w(const float* p) { return F::load(p); }
    static void store_w(float* p, WVec w) { F::store(p, w); }
    static typename F::Vec madd(typename F::Vec acc, XVec x, WVec w) { return F::fma(x, w, acc); }
};

// How the loops of dot_scaled.h compute one tile of a product with blocks.
template <class P>
struct BlockTiles {
    using F = typename P::F;
    using D = typename P::Decoder;
    static constexpr auto kSize = static_cast<int64_t>(sizeof(typename D::Stored));

    static int64_t row_bytes(int64_t depth) { return depth / D::kPack * kSize; }

    // Of the first lane of a step, in the order of columns.
    static int64_t scale_at(int64_t k) { return P::column(k) / D::kGroup; }

    static void begin(const DotJob& /*job*/, ScaledPanel<P>& panel) {
        constexpr int64_t kPart = P::kStep / static_cast<int64_t>(P::kParts);
        for (int half = 0; half < P::kHalves; ++half) {
            for (int64_t lane = 0; lane < F::kLanes; ++lane) {
                const int64_t position = half * kPart + lane * kPart / F::kLanes;
                panel.lanes[half][lane] =
                    static_cast<int32_t>(P::column(position) / D::kGroup - scale_at(0));
            }
        }
    }

    static void load_scales(const DotJob& job, int64_t /*output*/, int count,
                            ScaledPanel<P>& panel) {
        const int64_t scales = job.depth / D::kGroup;
        D::scales(ScaleJob<F>{panel.w, job.w_stride, count, job.depth / D::kPack, panel.scales[0],
                              panel.minima[0]});
        // Lanes beyond the depth have sums of zero; their scales must be numbers.
        for (int n = 0; n < count; ++n) F::store(panel.scales[n] + scales, F::splat(0.0f));
    }

    template <int kRows, int kOutputs, From kFrom>
    static inline void tile(const DotJob& job, const ScaledPanel<P>& panel, const void* const* x,
                            float* y) {
        using X = typename P::X;
        constexpr int64_t kPart = P::kStep / static_cast<int64_t>(P::kParts);
        constexpr auto kHalves = static_cast<size_t>(P::kHalves);
        const int64_t padded = padded_depth<P>(job.depth);
        typename F::Lanes lanes[kHalves];
        for (size_t half = 0; half < kHalves; ++half) lanes[half] = F::lanes(panel.lanes[half]);
        typename F::Vec acc[kRows][kOutputs];
        typename F::Vec partial[kRows][kOutputs];
        const X* rows[kRows];
        for (int r = 0; r < kRows; ++r) {
            rows[r] = static_cast<const X*>(x[r]);
            for (int n = 0; n < kOutputs; ++n) acc[r][n] = F::splat(0.0f);
        }
        for (int64_t k = 0; k < padded; k += P::kStep) {
            typename P::Packed packed[kOutputs];
            if constexpr (kFrom != From::kPanel) {
                const int64_t at = k / D::kPack * kSize + panel.ahead;
#pragma GCC unroll 8
                for (int n = 0; n < kOutputs; ++n) {
                    const std::byte* row = panel.w + n * job.w_stride;
                    for (int64_t line = 0; line < kSize * P::kStep / D::kPack; line += 64) {
                        __builtin_prefetch(row + at + k % D::kPack * kSize / D::kPack + line, 0, 2);
                    }
                    packed[n] = k + P::kStep <= job.depth ? P::load(row, k)
                                                          : P::load_first(row, k, job.depth - k);
                }
            }
            const int64_t scale = scale_at(k);
            const auto half_of_step = [&]<size_t kHalf>() __attribute__((always_inline)) {
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
                        } else {
                            w = P::template decode<kIndex>(packed[n]);
                        }
                        if constexpr (kFrom == From::kStoredAndKept) {
                            P::store_w(panel.kept + n * padded + at, w);
                        }
#pragma GCC unroll 8
                        for (int r = 0; r < kRows; ++r) {
                            partial[r][n] = P::madd(partial[r][n], xs[r], w);
                        }
                    }
                };
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
                    for (int n = 0; n < kOutputs; ++n) partial[r][n] = F::splat(0.0f);
                }
                [&]<size_t... kIndex>(std::index_sequence<kIndex...>)
                    __attribute__((always_inline)) {
                        (part.template operator()<kHalves * kIndex + kHalf>(), ...);
                    }(std::make_index_sequence<P::kParts / kHalves>());
#pragma GCC unroll 8
                for (int n = 0; n < kOutputs; ++n) {
                    const auto scales = F::spread(panel.scales[n] + scale, lanes[kHalf]);
#pragma GCC unroll 8
                    for (int r = 0; r < kRows; ++r) {
                        acc[r][n] = F::fma(scales, partial[r][n], acc[r][n]);
                    }
                }
            };
            [&]<size_t... kHalf>(std::index_sequence<kHalf...>) __attribute__((always_inline)) {
                (half_of_step.template operator()<kHalf>(), ...);
            }(std::make_index_sequence<kHalves>());
        }
        if constexpr (D::kMinima) {
            const int64_t groups = job.depth / D::kGroup;
            for (int r = 0; r < kRows; ++r) {
                const auto* sums = reinterpret_cast<const float*>(rows[r] + padded);
                for (int n = 0; n < kOutputs; ++n) {
                    for (int64_t g = 0; g < groups; g += F::kLanes) {
                        const bool whole = g + F::kLanes <= groups;
                        const auto of_x =
                            whole ? F::load(sums + g) : F::load_first(sums + g, groups - g);
                        const auto of_w = whole ? F::load(panel.minima[n] + g)
                                                : F::load_first(panel.minima[n] + g, groups - g);
                        acc[r][n] = F::sub(acc[r][n], F::mul(of_w, of_x));
                    }
                }
            }
        }
        write_sums<F, kRows, kOutputs>(acc, 1.0f, job.y_stride, y);
    }
};

// The activations of one row in the order of a product's parts, padded to whole steps. Behind
// them, where groups have minima, the sum of each group.
template <class P>
inline void arrange_blocks(const void* from, int64_t count, void* to) {
    using X = typename P::X;
    const auto* x = static_cast<const X*>(from);
    auto* out = static_cast<X*>(to);
    const int64_t padded = padded_depth<P>(count);
    for (int64_t k = 0; k < padded; ++k) {
        const int64_t column = P::column(k);
        out[k] = column < count ? x[column] : X{};
    }
    if constexpr (P::Decoder::kMinima) {
        constexpr int64_t kGroup = P::Decoder::kGroup;
        auto* sums = reinterpret_cast<float*>(out + padded);
        float group[kGroup];
        for (int64_t k = 0; k < count; k += kGroup) {
            widen_row<typename P::F>(x + k, kGroup, group);
            float sum = 0;
            for (const float value : group) sum += value;
            sums[k / kGroup] = sum;
        }
    }
}

template <class P>
constexpr Product block_product() {
    return {dot_scaled<P, BlockTiles<P>>, arrange_blocks<P>, P::kStep,
            P::Decoder::kMinima ? P::Decoder::kGroup : 0};
}

}  // namespace
}  // namespace moeinf
