// The matrix product of packed weights of up to six bits with bf16 activations, in whole numbers
// (AVX-512 with VNNI). Included only by kernels_avx512bf16.cpp; unnamed for the reason float_math.h
// gives.
//
// The activations of a step become whole numbers of 22 bits and a sign, times a power of two of the
// step: exact to 2^-22 of the largest of them (2^-21 where codes have eight bits), or to 2^-126. A
// number is three digits of eight bits with signs. Codes are bytes without signs; an instruction
// multiplies 64 of them by 64 digits. So the sum of a lane over a step is a whole number, exact in
// any order. Then it is scaled, and added to the sums of the row as dot_scaled.h does. Codes stand
// for numbers that are kOffset smaller; what that makes of the sum of each lane is arranged beside
// the digits. On the way a sum may leave 32 bits: only its end must fit.
//
// An arranged step is the lower codes' and the upper codes' digits, the highest first; for each
// half -kOffset times the sums of its lanes; and a line with the power of two.
#pragma once

#include <bit>
#include <limits>

#include "cpu_kernels/dot_blocks.h"
#include "cpu_kernels/formats/decoders.h"
#include "floats/avx512.h"

namespace moeinf {
namespace {

constexpr int kDigits = 3;
constexpr int64_t kDigitStep = 128;

// What the products share.
template <int kCodeOffset, int kCodeHalves>
struct Digits {
    using F = Floats512;
    using X = uint8_t;
    using XVec = __m512i;
    using WVec = __m512i;
    static constexpr bool kWhole = true;
    static constexpr int kOffset = kCodeOffset;
    static constexpr int kRows = 4;
    static constexpr int kOutputs = 4;
    static constexpr int64_t kSumsAt = 128 * kDigits;
    static constexpr int64_t kPowerAt = kSumsAt + (kOffset == 0 ? 0 : 64 * kCodeHalves);
    static constexpr int64_t kStepBytes = kPowerAt + 64;

    static WVec load_w(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static void store_w(uint8_t* p, WVec w) { _mm512_storeu_si512(p, w); }

    // `first` and the sums of the lanes of a half of a step, whose codes are one vector or two. Of
    // two, the last digit has a sum of its own: the next product of a sum waits for five cycles.
    template <size_t kCount>
    static __m512i lane_sums(__m512i first, const uint8_t* digits, const __m512i (&codes)[kCount]) {
        const auto add = [&](int digit, __m512i sum) __attribute__((always_inline)) {
#pragma GCC unroll 2
            for (size_t part = 0; part < kCount; ++part) {
                const auto at = (2 * digit + static_cast<int64_t>(part)) * 64;
                sum = _mm512_dpbusd_epi32(sum, codes[part], _mm512_loadu_si512(digits + at));
            }
            return sum;
        };
        __m512i upper = _mm512_slli_epi32(add(0, _mm512_setzero_si512()), 8);
        upper = _mm512_slli_epi32(add(1, upper), 8);
        if constexpr (kCount == 1) return add(2, _mm512_add_epi32(upper, first));
        return _mm512_add_epi32(upper, add(2, first));
    }
};

// The lower or the upper codes of bytes, of some bits.
template <size_t kPart, int kBits>
inline __m512i codes_of(__m512i packed) {
    return _mm512_and_si512(kPart == 0 ? packed : _mm512_srli_epi16(packed, kBits),
                            _mm512_set1_epi8((1 << kBits) - 1));
}

// Where codes are looked up: what makes their numbers whole. 0: codes are the numbers.
template <class Decoder>
constexpr int kTimes = 0;
template <>
constexpr int kTimes<E2M1Weights> = 2;
template <>
constexpr int kTimes<Mxfp4Weights> = 2;
template <>
constexpr int kTimes<Iq4NlWeights> = 1;
template <>
constexpr int kTimes<Iq4XsWeights> = 1;

// Bits of an activation, without its sign: the sum of eight products needs 32 bits at most.
template <class Decoder>
constexpr int kActivationBits = kTimes<Decoder> == 1 ? 21 : 22;

template <class Decoder>
inline __m512i whole_codes(__m512i codes, int offset) {
    if constexpr (kTimes<Decoder> == 0) return codes;
    alignas(16) uint8_t table[16];
    for (int i = 0; i < 16; ++i) {
        const auto number = static_cast<int>(kTimes<Decoder> * Decoder::kTable[i]);
        table[i] = static_cast<uint8_t>(number + offset);
    }
    return _mm512_shuffle_epi8(
        _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), codes);
}

// Two codes in a byte, and scales beside them.
template <class D, int kCodeOffset>
struct NibbleDigits : Digits<kCodeOffset, 1> {
    using Decoder = D;
    using Packed = __m512i;
    using Zero = NoZero;
    static constexpr bool kZeros = false;
    static constexpr bool kMinima = false;
    static constexpr int kHalves = 1;
    static constexpr int64_t kPack = 2;
    static constexpr size_t kParts = 2;
    static constexpr int64_t kStep = kDigitStep;
    static constexpr int64_t kApart = 2;  // columns of neighbouring codes

    static int64_t column(int64_t position) {
        return position / kStep * kStep + 2 * (position % 64) + position % kStep / 64;
    }
    static Packed load(const std::byte* row, int64_t k) { return _mm512_loadu_si512(row + k / 2); }
    static Packed load_first(const std::byte* row, int64_t k, int64_t n) {
        return Floats512::load_words_first(row + k / 2, n / 2);
    }
    template <size_t kPart>
    static __m512i decode(Packed packed) {
        return whole_codes<Decoder>(codes_of<kPart, 4>(packed), kCodeOffset);
    }
};

using E2M1Digits = NibbleDigits<E2M1Weights, 12>;

// The zero point z, from -8 to 7, and the code c stand for c - 8 - z: c + 8 - z less 16.
struct ZeroedInt4Digits : NibbleDigits<Int4Weights, 8> {
    using Zero = __m512i;
    static constexpr bool kZeros = true;
    static Zero zero(__m512 zeros) {
        const __m512i less = _mm512_sub_epi32(_mm512_set1_epi32(8), _mm512_cvtps_epi32(zeros));
        return _mm512_shuffle_epi8(
            less, _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)));
    }
    template <size_t kPart>
    static __m512i decode(Packed packed, Zero zero) {
        return _mm512_add_epi8(codes_of<kPart, 4>(packed), zero);
    }
};

struct Int4Digits : NibbleDigits<Int4Weights, 8> {
    using Zeroed = ZeroedInt4Digits;
};

// Codes in blocks.
template <class D, int kCodeOffset>
struct BlockDigits : Digits<kCodeOffset, D::kHalves>, NibbleBlocks<Floats512, D, 1> {
    using Blocks = NibbleBlocks<Floats512, D, 1>;
    using F = Floats512;
    static constexpr int64_t kApart = 1;
    template <size_t kPart>
    static __m512i decode(const typename Blocks::Packed& packed) {
        if constexpr (D::kHighBits == 0) {
            return whole_codes<D>(codes_of<kPart, D::kBits>(packed.codes), kCodeOffset);
        } else {
            constexpr int kShift = D::kBits - D::kHalfShift * static_cast<int>(kPart);
            constexpr int kHigh = ((1 << D::kHighBits) - 1) << D::kBits;
            const __m512i high =
                _mm512_and_si512(_mm512_slli_epi16(packed.high, kShift), _mm512_set1_epi8(kHigh));
            const __m512i low =
                kPart == 0 ? packed.codes : _mm512_srli_epi16(packed.codes, D::kBits);
            // The lower bits of `low`, all others of `high`.
            return _mm512_ternarylogic_epi32(_mm512_set1_epi8((1 << D::kBits) - 1), low, high,
                                             0xca);
        }
    }
};

// As sum_runs of dot_scaled.h.
template <class P, class Scales, int kSteps, int kRows, int kOutputs, bool kKept>
    requires P::kWhole
[[gnu::always_inline]] inline void sum_runs(const DotJob& job, const ScaledPanel<P>& panel,
                                            int first, int apart,
                                            const typename P::X* const (&x)[kRows],
                                            typename P::F::Vec (&acc)[kRows][kOutputs]) {
    using F = typename P::F;
    constexpr int kParts = 2 / P::kHalves;  // of a half
    const int64_t padded = padded_depth<P>(job.depth);
    const uint8_t* kept = kKept ? panel.kept + first * padded : nullptr;
    auto row = rows_apart<P, Scales, kOutputs>(job, panel, first, apart);
    typename F::Lanes lanes[P::kHalves];
    for (int half = 0; half < P::kHalves; ++half) lanes[half] = F::lanes(panel.lanes[half]);
    clear<F>(acc);
    const auto run = [&]<bool kWhole>(int64_t k) __attribute__((always_inline)) {
        const int64_t scale = Scales::scale_at(panel, k);
        const int64_t at = k / P::kStep * P::kStepBytes;
        __m512i codes[kOutputs][P::kHalves][kParts];
#pragma GCC unroll 8
        for (int n = 0; n < kOutputs; ++n) {
            if constexpr (kKept) {
#pragma GCC unroll 2
                for (int part = 0; part < 2; ++part) {
                    codes[n][part / kParts][part % kParts] =
                        P::load_w(kept + n * padded + k + 64 * part);
                }
            } else {
                row[n].template begin<1>(k, scale);
                row[n].template load<kWhole>(k);
                codes[n][0][0] = row[n].template part<0>();
                codes[n][1 / kParts][1 % kParts] = row[n].template part<1>();
            }
        }
#pragma GCC unroll 2
        for (int half = 0; half < P::kHalves; ++half) {
#pragma GCC unroll 8
            for (int n = 0; n < kOutputs; ++n) {
                const float* from = panel.scales[first + n * apart] + scale;
                const auto factor = F::spread(from, lanes[half]);
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    const uint8_t* step = x[r] + at;
                    __m512i less = _mm512_setzero_si512();
                    if constexpr (P::kOffset != 0) {
                        less = _mm512_loadu_si512(step + P::kSumsAt + 64 * half);
                        if constexpr (P::kZeros) less = _mm512_add_epi32(less, less);
                    }
                    const __m512i sum = P::lane_sums(less, step + 64 * half, codes[n][half]);
                    const auto power =
                        F::splat(*reinterpret_cast<const float*>(step + P::kPowerAt));
                    // In this order: scales times powers may be too small for a float.
                    acc[r][n] = F::fma(factor, F::mul(_mm512_cvtepi32_ps(sum), power), acc[r][n]);
                }
            }
        }
    };
    for_runs<P, 1>(job.depth, run);
    if constexpr (P::kMinima) Scales::subtract_minima(job, panel, first, apart, x, acc);
}

// The activations of a step, in the order of its codes.
template <class P>
inline void in_order(const BF16* x, int64_t k, int64_t count, BF16 (&values)[P::kStep]) {
    if (k + P::kStep <= count) {
        for (int64_t i = 0; i < P::kStep; i += 16) {
            const BF16* from = x + P::column(k + i);
            for (int64_t j = 0; j < 16; ++j) values[i + j] = from[P::kApart * j];
        }
        return;
    }
    for (int64_t i = 0; i < P::kStep; ++i) {
        const int64_t column = P::column(k + i);
        values[i] = column < count ? x[column] : BF16{};
    }
}

// The activations of one row. Those that are no numbers make the power of two one that is none.
template <class P>
void arrange_digits(const void* from, int64_t count, void* to) {
    using Decoder = typename P::Decoder;
    auto* step = static_cast<uint8_t*>(to);
    [[maybe_unused]] auto* groups =
        reinterpret_cast<float*>(step + arranged_elements<P>(count));  // their sums
    for (int64_t k = 0; k < count; k += P::kStep, step += P::kStepBytes) {
        alignas(64) BF16 values[P::kStep];
        in_order<P>(static_cast<const BF16*>(from), k, count, values);
        int largest = 0;
        for (const BF16 value : values) largest = std::max(largest, value.bits & 0x7fff);
        // All numbers are below 2^kActivationBits, and the power is a normal float.
        const int exponent = std::max(largest >> 7, 23);
        const auto power_of = [](int biased) {
            return std::bit_cast<float>(static_cast<uint32_t>(biased) << 23);
        };
        const auto times = Floats512::splat(power_of(253 + kActivationBits<Decoder> - exponent));
        for (int64_t i = 0; i < P::kStep; i += 16) {
            // 128 is added to each digit, so that none has a sign.
            const __m512i number = _mm512_add_epi32(
                _mm512_cvtps_epi32(Floats512::mul(Floats512::load(values + i), times)),
                _mm512_set1_epi32(0x808080));
            for (int digit = 0; digit < kDigits; ++digit) {
                const __m128i bytes = _mm512_cvtepi32_epi8(
                    _mm512_srli_epi32(number, static_cast<unsigned>(8 * (kDigits - 1 - digit))));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(step + 128 * digit + i),
                                 _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
            }
        }
        const float power =
            largest < 0x7f80
                ? power_of(exponent + 1 - kActivationBits<Decoder> - kTimes<Decoder> / 2)
                : std::numeric_limits<float>::quiet_NaN();
        std::memcpy(step + P::kPowerAt, &power, sizeof power);

        // The sums of the lanes of a half, times a code.
        const __m512i zero = _mm512_setzero_si512();
        const auto sums = [&](int half, int8_t code) {
            const __m512i codes = _mm512_set1_epi8(code);
            if constexpr (P::kHalves == 1) {
                return P::lane_sums(zero, step, {codes, codes});
            } else {
                return P::lane_sums(zero, step + 64 * half, {codes});
            }
        };
        [[maybe_unused]] int32_t of_group[P::kStep / 16] = {};
        for (int half = 0; half < P::kHalves; ++half) {
            if constexpr (P::kOffset != 0) {
                _mm512_storeu_si512(step + P::kSumsAt + 64 * half,
                                    _mm512_sub_epi32(zero, sums(half, P::kOffset)));
            }
            if constexpr (P::kMinima) {
                alignas(64) int32_t lanes[16];
                _mm512_store_si512(lanes, sums(half, 1));
                for (int64_t l = 0; l < 16; ++l) {
                    of_group[P::column(64 * half + 4 * l) / P::Decoder::kGroup] += lanes[l];
                }
            }
        }
        if constexpr (P::kMinima) {
            for (int64_t g = 0; g < P::kStep / P::Decoder::kGroup; ++g) {
                *groups++ = static_cast<float>(of_group[g]) * power;
            }
        }
    }
}

template <class P, class Scales>
constexpr Product digits_product() {
    Product product{dot_scaled<P, Scales>, arrange_digits<P>, P::kStep, 0, P::kStepBytes};
    if constexpr (requires { typename P::Zeroed; }) product.dot = dot_with_or_without_zeros<P>;
    if constexpr (P::kMinima) product.sums = P::Decoder::kGroup;
    return product;
}

}  // namespace
}  // namespace moeinf
