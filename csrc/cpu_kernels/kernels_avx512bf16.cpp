// AVX-512 with bf16 products. bf16 hidden states and weights are multiplied without conversion,
// in pairs, into 32-bit sums; weights of up to six bits in whole numbers (dot_digits.h). The
// activations between the two products are rounded to bf16. The rest is the same as in
// kernels_avx512.cpp.
#include "cpu_kernels/dot_digits.h"
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

// Weights become bf16 without loss: the lower bytes of all words, then the upper ones.
struct E4M3Product {
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
    static constexpr int64_t kPack = 1;
    static constexpr size_t kParts = 2;
    static constexpr int64_t kStep = 64;

    static XVec load_x(const BF16* p) { return Bf16Product::load(p); }
    static WVec load_w(const BF16* p) { return Bf16Product::load(p); }
    static void store_w(BF16* p, WVec w) { _mm512_storeu_si512(p, reinterpret_cast<__m512i>(w)); }
    static __m512 madd(__m512 acc, XVec x, WVec w) { return _mm512_dpbf16_ps(acc, x, w); }

    static Packed load(const std::byte* row, int64_t k) { return F::load_words(row + k); }
    static Packed load_first(const std::byte* row, int64_t k, int64_t n) {
        return F::load_words_first(row + k, n);
    }
    template <size_t kPart>
    static WVec decode(Packed packed) {
        return reinterpret_cast<__m512bh>(F::bf16_of<kPart>(packed, E4M3{}));
    }
};

template <class P>
constexpr Product beside() {
    return digits_product<P, ScalesBeside<P>>();
}
template <class D, int kOffset>
constexpr Product in_blocks() {
    using P = BlockDigits<D, kOffset>;
    return digits_product<P, ScalesInBlocks<P>>();
}

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
constexpr Product Bf16::kProduct<E2M1Weights> = beside<E2M1Digits>();
template <>
constexpr Product Bf16::kProduct<Int4Weights> = beside<Int4Digits>();
template <>
constexpr Product Bf16::kProduct<Q40Weights> = in_blocks<Q40Weights, 8>();
template <>
constexpr Product Bf16::kProduct<Q41Weights> = in_blocks<Q41Weights, 0>();
template <>
constexpr Product Bf16::kProduct<Q50Weights> = in_blocks<Q50Weights, 16>();
template <>
constexpr Product Bf16::kProduct<Q51Weights> = in_blocks<Q51Weights, 0>();
template <>
constexpr Product Bf16::kProduct<Iq4NlWeights> = in_blocks<Iq4NlWeights, 127>();
template <>
constexpr Product Bf16::kProduct<Mxfp4Weights> = in_blocks<Mxfp4Weights, 12>();
template <>
constexpr Product Bf16::kProduct<Iq4XsWeights> = in_blocks<Iq4XsWeights, 127>();
template <>
constexpr Product Bf16::kProduct<Q2KWeights> = in_blocks<Q2KWeights, 0>();
template <>
constexpr Product Bf16::kProduct<Q3KWeights> = in_blocks<Q3KWeights, 4>();
template <>
constexpr Product Bf16::kProduct<Q4KWeights> = in_blocks<Q4KWeights, 0>();
template <>
constexpr Product Bf16::kProduct<Q5KWeights> = in_blocks<Q5KWeights, 0>();
template <>
constexpr Product Bf16::kProduct<Q6KWeights> = in_blocks<Q6KWeights, 32>();
template <>
constexpr Product Bf16::kProduct<Palette3Weights> = {
    palette_product<Floats512, Bf16Product, Palette3Weights>};
template <>
constexpr Product Bf16::kProduct<Palette7Weights> = {
    palette_product<Floats512, Bf16Product, Palette7Weights>};
template <>
constexpr Product Bf16::kProduct<Palette15Weights> = {
    palette_product<Floats512, Bf16Product, Palette15Weights>};

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
template <>
constexpr Amx::Tiles Amx::kTiles<Palette3Weights> =
    palette_tiles<Floats512, amx_bf16, Palette3Weights>;
template <>
constexpr Amx::Tiles Amx::kTiles<Palette7Weights> =
    palette_tiles<Floats512, amx_bf16, Palette7Weights>;
template <>
constexpr Amx::Tiles Amx::kTiles<Palette15Weights> =
    palette_tiles<Floats512, amx_bf16, Palette15Weights>;

}  // namespace

constinit const KernelSet kAvx512Bf16Kernels =
    FloatKernels<Floats512, Bf16>::set("avx512bf16", cpu_has_avx512bf16);
constinit const KernelSet kAmxKernels =
    FloatKernels<Floats512, Amx>::set("amx", cpu_has_amx, amx_arrange);

}  // namespace moeinf
