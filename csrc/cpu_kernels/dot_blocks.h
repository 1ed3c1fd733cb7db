// The matrix product of weights in blocks that have their own scales (cpu_kernels/formats/ggml.h).
// The order of a sum is that of dot_scaled.h, whose loops over tiles and panels this file shares.
//
//   y[r][n] = sum over steps, halves of scale * (sum over the half of x[r][k] * code[n][k])
//             - sum over groups of minimum * (sum over the group of x[r][k])
//
// A step takes the codes of kStep columns. In blocks of 256 columns, the lower halves of the bytes
// of a step belong to other groups of columns than the upper halves: each half has scales of its
// own. The sums of the activations of each group are made once, beside the arranged row.
#pragma once

#include <array>
#include <cstring>

#include "cpu_kernels/dot_scaled.h"
#include "cpu_kernels/formats/ggml.h"

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

// Four bytes of each of n blocks: bits j and j + 16 become bits 0 and 4 of byte j of 16 bytes.
template <class F>
inline typename F::Words load_bits(const std::byte* p, int64_t stride, int64_t n) {
    if constexpr (requires(typename F::Words blocks) { F::spread_bits(blocks); }) {
        return F::spread_bits(n < 4 ? F::load_quarters_first(p, stride, n)
                                    : F::load_quarters(p, stride));
    }
    std::array<uint64_t, F::kLanes / 2> bytes{};
    // Bit j of eight is in byte j; what is added carries it to the top of the byte.
    const auto spread = [](uint32_t bits) {
        const uint64_t each = (bits & 0xff) * 0x0101010101010101 & 0x8040201008040201;
        return (each + 0x00406070787c7e7f) >> 7 & 0x0101010101010101;
    };
    for (size_t i = 0; i < bytes.size() && static_cast<int64_t>(i) < 2 * n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, p + static_cast<int64_t>(i / 2) * stride, sizeof bits);
        bits >>= 8 * (i % 2);
        bytes[i] = spread(bits) | spread(bits >> 16) << 4;
    }
    return F::load_words(reinterpret_cast<const std::byte*>(bytes.data()));
}

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
    using Zero = NoZero;
    static constexpr bool kZeros = false;
    static constexpr int kHalves = D::kHalves;
    static constexpr bool kOneScale = false;

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
                    load_bits<F>(block + D::kHigh, kSize, 4)};
        } else if constexpr (D::kCodes == 16) {
            return {F::load_quarters(block + D::kFirst, kSize)};
        } else if constexpr (D::kHighBits == 0) {
            return {load_codes(block, byte % D::kCodes)};
        } else {
            const int64_t at = byte % D::kCodes;
            return {load_codes(block, at),
                    F::template load_shifted<2>(block + D::kHigh + D::high_byte(at),
                                                D::high_shift(at))};
        }
    }
    static typename F::Words load_codes(const std::byte* block, int64_t at) {
        if constexpr (D::kBits == 4) {
            return F::load_words(block + D::kFirst + at);
        } else {
            return F::template load_shifted<4>(block + D::kFirst + D::code_byte(at),
                                               D::code_shift(at));
        }
    }
    // Bits from the first code of a word to that of a part.
    static constexpr int shift_of(size_t part) {
        return static_cast<int>(8 * (part / 2) + D::kBits * (part % 2));
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
                return {codes, load_bits<F>(block + D::kHigh, kSize, n / D::kPack)};
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
        const auto low = F::template look_up<Base::shift_of(kPart)>(packed.codes, D::kTable);
        if constexpr (D::kHighBits == 0) {
            return low;
        } else {
            constexpr int kAt = static_cast<int>(kPart);
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
    using Zero = NoZero;
    static constexpr bool kZeros = false;
    static constexpr int kHalves = 1;
    static constexpr bool kOneScale = true;
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

// Scales in the blocks.
template <class P>
struct ScalesInBlocks {
    using F = typename P::F;
    using D = typename P::Decoder;
    static constexpr auto kSize = static_cast<int64_t>(sizeof(typename D::Stored));

    static int64_t byte_at(int64_t k) {
        return k / D::kPack * kSize + k % D::kPack * kSize / D::kPack;
    }
    // A run is a step. Steps of eight-bit codes are blocks.
    static int64_t steps(const DotJob& /*job*/) { return 1; }
    // Of the first lane of a step, in the order of columns.
    static int64_t scale_at(const ScaledPanel<P>& /*panel*/, int64_t k) {
        return P::column(k) / D::kGroup;
    }

    static void begin(const DotJob& /*job*/, ScaledPanel<P>& panel) {
        constexpr int64_t kPart = P::kStep / static_cast<int64_t>(P::kParts);
        for (int half = 0; half < P::kHalves; ++half) {
            for (int64_t lane = 0; lane < F::kLanes; ++lane) {
                const int64_t position = half * kPart + lane * kPart / F::kLanes;
                panel.lanes[half][lane] =
                    static_cast<int32_t>((P::column(position) - P::column(0)) / D::kGroup);
            }
        }
    }

    // They lie in the rows.
    static void prefetch(const DotJob& /*job*/, int64_t /*output*/, int64_t /*count*/) {}

    static void load(const DotJob& job, int64_t /*output*/, int count, ScaledPanel<P>& panel) {
        const int64_t scales = job.depth / D::kGroup;
        D::scales(ScaleJob<F>{panel.w, job.w_stride, count, job.depth / D::kPack, panel.scales[0],
                              panel.minima[0]});
        // Lanes beyond the depth have sums of zero; their scales must be numbers.
        for (int n = 0; n < count; ++n) F::store(panel.scales[n] + scales, F::splat(0.0f));
    }

    template <int kRows, int kOutputs>
    static void subtract_minima(const DotJob& job, const ScaledPanel<P>& panel, int first,
                                int apart, const typename P::X* const (&x)[kRows],
                                typename F::Vec (&acc)[kRows][kOutputs]) {
        const int64_t groups = job.depth / D::kGroup;
        for (int r = 0; r < kRows; ++r) {
            const auto* sums =
                reinterpret_cast<const float*>(x[r] + arranged_elements<P>(job.depth));
            for (int n = 0; n < kOutputs; ++n) {
                const float* minima = panel.minima[first + n * apart];
                for (int64_t g = 0; g < groups; g += F::kLanes) {
                    const auto load = [&](const float* from) {
                        return g + F::kLanes <= groups ? F::load(from + g)
                                                       : F::load_first(from + g, groups - g);
                    };
                    acc[r][n] = F::sub(acc[r][n], F::mul(load(minima), load(sums)));
                }
            }
        }
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
    return {dot_scaled<P, ScalesInBlocks<P>>, arrange_blocks<P>, P::kStep,
            P::Decoder::kMinima ? P::Decoder::kGroup : 0};
}

}  // namespace
}  // namespace moeinf
