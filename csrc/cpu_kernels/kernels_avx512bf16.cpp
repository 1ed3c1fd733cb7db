// AVX-512 with bf16 products. bf16 hidden states and weights are multiplied without conversion,
// in pairs, into 32-bit sums. The activations between the two products are rounded to bf16. The
// rest is the same as in kernels_avx512.cpp.
#include <array>
#include <bit>

#include "cpu_kernels/float_kernels.h"
#include "cpu_kernels/kernels_isa.h"
#include "floats/avx512.h"

namespace moeinf {
namespace {

struct Bf16Product {
    using Weights = Bf16Weights;
    using X = BF16;
    using W = BF16;
    using Acc = __m512;
    using XVec = __m512bh;
    using WVec = __m512bh;
    static constexpr int64_t kStep = 32;
    static constexpr int kRows = 4;
    static constexpr int kOutputs = 6;

    static Acc zero() { return _mm512_setzero_ps(); }
    static __m512bh load(const BF16* p) {
        return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
    }
    static __m512bh load_first(const BF16* p, int64_t n) {
        const auto mask = static_cast<__mmask32>((1u << n) - 1u);
        return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, p));
    }
    static XVec load_x(const BF16* p) { return load(p); }
    static XVec load_x_first(const BF16* p, int64_t n) { return load_first(p, n); }
    static WVec load_w(const BF16* row, int64_t k) { return load(row + k); }
    static WVec load_w_first(const BF16* row, int64_t k, int64_t n) {
        return load_first(row + k, n);
    }
    static Acc madd(Acc acc, XVec x, WVec w) { return _mm512_dpbf16_ps(acc, x, w); }
    static void sum4(Acc a, Acc b, Acc c, Acc d, float* out) { Floats512::sum4(a, b, c, d, out); }
};

// What the products of weights with scales share. The weights become bf16 without loss.
struct ScaledBf16Product {
    using F = Floats512;
    using X = BF16;
    using XVec = __m512bh;
    using WVec = __m512bh;
    using Packed = __m512i;  // 32 words of 16 bits
    using Zero = NoZero;
    static constexpr bool kZeros = false;
    static constexpr bool kMinima = false;
    static constexpr int kHalves = 1;
    static constexpr bool kOneScale = false;
    static constexpr int kRows = 4;
    static constexpr int kOutputs = 6;

    static XVec load_x(const BF16* p) { return Bf16Product::load(p); }
    static WVec load_w(const BF16* p) { return Bf16Product::load(p); }
    static void store_w(BF16* p, WVec w) { _mm512_storeu_si512(p, reinterpret_cast<__m512i>(w)); }
    static __m512 madd(__m512 acc, XVec x, WVec w) { return _mm512_dpbf16_ps(acc, x, w); }
};

// 16 floats as bf16.
inline __m256i bf16_table(const float (&table)[16]) {
    const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(table));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

inline __m512i table_twice(const float (&table)[16]) {
    return _mm512_broadcast_i64x4(bf16_table(table));
}

inline __m512bh look_up(__m512i words, __m512i table) {
    return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(words, table));
}

// Each part takes the same four bits of all words. The table holds every value twice, so that the
// fifth bit does not matter.
template <class Decoder>
struct NibbleProduct : ScaledBf16Product {
    static constexpr int64_t kPack = 2;
    static constexpr size_t kParts = 4;
    static constexpr int64_t kStep = 128;

    static Packed load(const std::byte* row, int64_t k) { return F::load_words(row + k / 2); }
    static Packed load_first(const std::byte* row, int64_t k, int64_t n) {
        return F::load_words_first(row + k / 2, n / 2);
    }
    template <size_t kPart>
    static WVec decode(Packed packed) {
        return look_up(_mm512_srli_epi16(packed, 4 * kPart), table_twice(Decoder::kTable));
    }
};

// Integers of four bits less integers of four bits: a table of the 31 differences.
template <class Decoder>
struct ZeroedNibbleProduct : NibbleProduct<Decoder> {
    using Base = NibbleProduct<Decoder>;
    using Zero = __m512i;  // for each code, the index of the difference
    static constexpr bool kZeros = true;

    static constexpr std::array<uint16_t, 32> differences() {
        std::array<uint16_t, 32> table{};
        for (int i = 0; i < 31; ++i) {
            const auto value = static_cast<float>(i - 15);
            table[static_cast<size_t>(i)] =
                static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
        }
        return table;
    }
    // The zero point z, from -8 to 7, and the code c stand for c - 8 - z, at place c + 7 - z.
    static Zero zero(__m512 zeros) {
        const __m512i places = _mm512_sub_epi32(_mm512_set1_epi32(7), _mm512_cvtps_epi32(zeros));
        return _mm512_or_si512(places, _mm512_slli_epi32(places, 16));
    }
    template <size_t kPart>
    static __m512bh decode(__m512i packed, Zero zero) {
        alignas(64) static constexpr std::array<uint16_t, 32> kTable = differences();
        const __m512i code =
            _mm512_and_si512(_mm512_srli_epi16(packed, 4 * kPart), _mm512_set1_epi16(15));
        return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(
            _mm512_add_epi16(code, zero), _mm512_load_si512(kTable.data())));
    }
};

struct Int4Product : NibbleProduct<Int4Weights> {
    using Zeroed = ZeroedNibbleProduct<Int4Weights>;
};

// The lower bytes of all words, then the upper ones.
struct E4M3Product : ScaledBf16Product {
    static constexpr int64_t kPack = 1;
    static constexpr size_t kParts = 2;
    static constexpr int64_t kStep = 64;

    static Packed load(const std::byte* row, int64_t k) { return F::load_words(row + k); }
    static Packed load_first(const std::byte* row, int64_t k, int64_t n) {
        return F::load_words_first(row + k, n);
    }
    template <size_t kPart>
    static WVec decode(Packed packed) {
        return reinterpret_cast<__m512bh>(F::bf16_of<kPart>(packed, E4M3{}));
    }
};

// Weights in blocks. A code of five or six bits is put together, and looked up in 32 or 64 numbers.
template <class D>
struct NibbleBlocksProduct : NibbleBlocks<Floats512, D, 2> {
    using Base = NibbleBlocks<Floats512, D, 2>;
    using X = BF16;
    using XVec = __m512bh;
    using WVec = __m512bh;
    static constexpr int kRows = 4;
    static constexpr int kOutputs = D::kHighBits == 0 ? 6 : 4;

    static XVec load_x(const BF16* p) { return Bf16Product::load(p); }
    static WVec load_w(const BF16* p) { return Bf16Product::load(p); }
    static void store_w(BF16* p, WVec w) { ScaledBf16Product::store_w(p, w); }
    static __m512 madd(__m512 acc, XVec x, WVec w) { return _mm512_dpbf16_ps(acc, x, w); }

    // The table with the number of some high bits added.
    template <int kHigh>
    static __m256i table_of() {
        float sums[16];
        for (int i = 0; i < 16; ++i) sums[i] = D::kTable[i] + D::kHighTable[kHigh];
        return bf16_table(sums);
    }
    template <int kHigh>
    static __m512i two_tables() {
        return _mm512_inserti64x4(_mm512_castsi256_si512(table_of<kHigh>()), table_of<kHigh + 1>(),
                                  1);
    }
    template <size_t kPart>
    static WVec decode(const typename Base::Packed& packed) {
        constexpr int kAt = static_cast<int>(kPart);
        const __m512i low = _mm512_srli_epi16(packed.codes, Base::shift_of(kPart));
        if constexpr (D::kHighBits == 0) {
            return look_up(low, table_twice(D::kTable));
        } else {
            constexpr int kShift = 8 * (kAt / 2) + D::kHalfShift * (kAt % 2) - 4;
            const __m512i high = kShift < 0 ? _mm512_slli_epi16(packed.high, -kShift & 15)
                                            : _mm512_srli_epi16(packed.high, kShift & 15);
            // The lower four bits of `low`, all others of `high`.
            const __m512i code = _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), low, high, 0xca);
            if constexpr (D::kHighBits == 1) {
                return look_up(code, two_tables<0>());
            } else {
                return reinterpret_cast<__m512bh>(
                    _mm512_permutex2var_epi16(two_tables<0>(), code, two_tables<2>()));
            }
        }
    }
};

struct Bf16 {
    static constexpr bool kGates = true;
    template <class Decoder>
    static constexpr Product kProduct = {};
    template <class Decoder>
    static constexpr void (*kTiles)(const DotJob&) = nullptr;
};
template <>
constexpr Product Bf16::kProduct<Bf16Weights> = {dot_block<Bf16Product>};
template <>
constexpr Product Bf16::kProduct<E4M3Weights> = scaled_product<E4M3Product>();
template <>
constexpr Product Bf16::kProduct<E2M1Weights> = scaled_product<NibbleProduct<E2M1Weights>>();
template <>
constexpr Product Bf16::kProduct<Int4Weights> = scaled_product<Int4Product>();
template <>
constexpr Product Bf16::kProduct<Q40Weights> = block_product<NibbleBlocksProduct<Q40Weights>>();
template <>
constexpr Product Bf16::kProduct<Q41Weights> = block_product<NibbleBlocksProduct<Q41Weights>>();
template <>
constexpr Product Bf16::kProduct<Q50Weights> = block_product<NibbleBlocksProduct<Q50Weights>>();
template <>
constexpr Product Bf16::kProduct<Q51Weights> = block_product<NibbleBlocksProduct<Q51Weights>>();
template <>
constexpr Product Bf16::kProduct<Iq4NlWeights> = block_product<NibbleBlocksProduct<Iq4NlWeights>>();
template <>
constexpr Product Bf16::kProduct<Mxfp4Weights> = block_product<NibbleBlocksProduct<Mxfp4Weights>>();
template <>
constexpr Product Bf16::kProduct<Iq4XsWeights> = block_product<NibbleBlocksProduct<Iq4XsWeights>>();
template <>
constexpr Product Bf16::kProduct<Q2KWeights> = block_product<NibbleBlocksProduct<Q2KWeights>>();
template <>
constexpr Product Bf16::kProduct<Q3KWeights> = block_product<NibbleBlocksProduct<Q3KWeights>>();
template <>
constexpr Product Bf16::kProduct<Q4KWeights> = block_product<NibbleBlocksProduct<Q4KWeights>>();
template <>
constexpr Product Bf16::kProduct<Q5KWeights> = block_product<NibbleBlocksProduct<Q5KWeights>>();
template <>
constexpr Product Bf16::kProduct<Q6KWeights> = block_product<NibbleBlocksProduct<Q6KWeights>>();

// The same, with a matrix unit.
struct Amx : Bf16 {
    using Tiles = void (*)(const DotJob&);
    template <class Decoder>
    static constexpr Tiles kTiles = nullptr;
};
template <>
constexpr Amx::Tiles Amx::kTiles<Bf16Weights> = amx_bf16;
template <>
constexpr Amx::Tiles Amx::kTiles<E4M3Weights> = amx_e4m3;
template <>
constexpr Amx::Tiles Amx::kTiles<E2M1Weights> = amx_e2m1;
template <>
constexpr Amx::Tiles Amx::kTiles<Int8Weights> = amx_int8;
template <>
constexpr Amx::Tiles Amx::kTiles<Int4Weights> = amx_int4;
template <>
constexpr Amx::Tiles Amx::kTiles<Q80Weights> = amx_q8_0;
template <>
constexpr Amx::Tiles Amx::kTiles<Q40Weights> = amx_q4_0;
template <>
constexpr Amx::Tiles Amx::kTiles<Q41Weights> = amx_q4_1;
template <>
constexpr Amx::Tiles Amx::kTiles<Q50Weights> = amx_q5_0;
template <>
constexpr Amx::Tiles Amx::kTiles<Q51Weights> = amx_q5_1;
template <>
constexpr Amx::Tiles Amx::kTiles<Iq4NlWeights> = amx_iq4_nl;
template <>
constexpr Amx::Tiles Amx::kTiles<Mxfp4Weights> = amx_mxfp4;
template <>
constexpr Amx::Tiles Amx::kTiles<Iq4XsWeights> = amx_iq4_xs;
template <>
constexpr Amx::Tiles Amx::kTiles<Q3KWeights> = amx_q3_k;
template <>
constexpr Amx::Tiles Amx::kTiles<Q4KWeights> = amx_q4_k;
template <>
constexpr Amx::Tiles Amx::kTiles<Q5KWeights> = amx_q5_k;
template <>
constexpr Amx::Tiles Amx::kTiles<Q6KWeights> = amx_q6_k;

}  // namespace

constinit const KernelSet kAvx512Bf16Kernels =
    FloatKernels<Floats512, Bf16>::set("avx512bf16", cpu_has_avx512bf16);
constinit const KernelSet kAmxKernels =
    FloatKernels<Floats512, Amx>::set("amx", cpu_has_amx, amx_arrange);

}  // namespace moeinf
