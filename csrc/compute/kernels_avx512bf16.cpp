// AVX-512 with bf16 products. bf16 hidden states and weights are multiplied without conversion,
// in pairs, into 32-bit sums. The activations between the two products are rounded to bf16. The
// rest is the same as in kernels_avx512.cpp.
#include "compute/float_kernels.h"
#include "compute/floats_avx512.h"
#include "compute/kernels_isa.h"

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

struct Bf16 {
    static constexpr bool kGates = true;
    template <class Decoder>
    static constexpr void (*kDot)(const DotJob&) = nullptr;
};
template <>
constexpr void (*Bf16::kDot<Bf16Weights>)(const DotJob&) = dot_block<Bf16Product>;

}  // namespace

constinit const KernelSet kAvx512Bf16Kernels =
    FloatKernels<Floats512, Bf16>::set("avx512bf16", cpu_has_avx512bf16);

}  // namespace moeinf
