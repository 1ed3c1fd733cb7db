// Sixteen floats in an AVX-512 register: loads from and stores to every format, and the few
// operations that float_math.h and dot_tile.h are written in. Included only by kernels_avx512*.cpp.
#pragma once

// GCC 12 warns of undefined registers in its own header.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "base/dtype.h"

namespace moeinf {
namespace {

struct Floats512 {
    using Vec = __m512;
    static constexpr int64_t kLanes = 16;
    static constexpr int kTileRows = 4;
    static constexpr int kTileOutputs = 6;

    static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
    static Vec widen(__m256i bf16) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
    }

    static Vec load(const float* p) { return _mm512_loadu_ps(p); }
    static Vec load(const BF16* p) {
        return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static Vec load(const F16* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static Vec numbers(__m512i bits) { return _mm512_castsi512_ps(bits); }
    // 2^(b - 127) has exponent b, except for b = 0.
    static Vec powers(__m128i bytes) { return powers(_mm512_cvtepu8_epi32(bytes)); }
    static Vec powers(__m512i b) {
        const __m512i tiny = _mm512_set1_epi32(0x00400000);
        return numbers(
            _mm512_mask_mov_epi32(_mm512_slli_epi32(b, 23), _mm512_testn_epi32_mask(b, b), tiny));
    }
    // Moved by 7 bits, an e4m3 number is a half 2^8 times as small.
    static Vec eights(__m128i bytes) {
        const __m256i moved = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
        const __m256i half = _mm256_and_si256(moved, _mm256_set1_epi16(-0x4080));
        return _mm512_mul_ps(_mm512_cvtph_ps(half), splat(256.0f));
    }
    static Vec load(const E8M0* p) { return powers(bytes(p)); }
    static Vec load(const E4M3* p) { return eights(bytes(p)); }
    static Vec load(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes(p))); }
    static __m128i bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
    // The first n < 16 elements, the rest zero. A masked load reads no byte behind them.
    static Vec load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
    static Vec load_first(const BF16* p, int64_t n) {
        return widen(_mm256_maskz_loadu_epi16(first(n), p));
    }
    static Vec load_first(const F16* p, int64_t n) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
    }

    static __m128i first_bytes(const void* p, int64_t n) {
        return _mm_maskz_loadu_epi8(first(n), p);
    }
    static Vec load_first(const E8M0* p, int64_t n) { return powers(first_bytes(p, n)); }
    static Vec load_first(const E4M3* p, int64_t n) { return eights(first_bytes(p, n)); }
    static Vec load_first(const int8_t* p, int64_t n) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(first_bytes(p, n)));
    }

    // 64 bytes as 16 words, and the float that a table has for four bits of each word.
    using Words = __m512i;
    static Words load_words(const std::byte* p) { return _mm512_loadu_si512(p); }
    static Words load_words_first(const std::byte* p, int64_t nbytes) {  // nbytes < 64
        return _mm512_maskz_loadu_epi8((uint64_t{1} << nbytes) - 1, p);
    }
    // Four times 16 bytes, at equal distances; or the first n of them.
    static Words load_quarters_first(const std::byte* p, int64_t stride, int64_t n) {
        __m512i words = _mm512_castsi128_si512(bytes(p));
        if (n > 1) words = _mm512_mask_broadcast_i32x4(words, 0x00f0, bytes(p + stride));
        if (n > 2) words = _mm512_mask_broadcast_i32x4(words, 0x0f00, bytes(p + 2 * stride));
        if (n > 3) words = _mm512_mask_broadcast_i32x4(words, 0xf000, bytes(p + 3 * stride));
        return _mm512_maskz_mov_epi32(static_cast<__mmask16>((1u << 4 * n) - 1u), words);
    }
    static Words load_quarters(const std::byte* p, int64_t stride) {
        __m512i words = _mm512_castsi128_si512(bytes(p));
        words = _mm512_mask_broadcast_i32x4(words, 0x00f0, bytes(p + stride));
        words = _mm512_mask_broadcast_i32x4(words, 0x0f00, bytes(p + 2 * stride));
        return _mm512_mask_broadcast_i32x4(words, 0xf000, bytes(p + 3 * stride));
    }
    // 32 bytes twice, the words shifted to the right; the second ones by kMore bits more.
    template <int kMore>
    static Words load_shifted(const std::byte* p, int shift) {
        const __m512i twice =
            _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        const __m512i more = _mm512_maskz_set1_epi32(0xff00, kMore);
        return _mm512_srlv_epi32(twice, _mm512_add_epi32(more, _mm512_set1_epi32(shift)));
    }
    // See SixBitScales: of the first 16 bytes of four blocks.
    static void six_bits(Words blocks, int8_t* scales, int8_t* minima) {
        const __m512i low = _mm512_srlv_epi32(_mm512_shuffle_epi32(blocks, _MM_PERM_DCDB),
                                              _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0, 0, 4)));
        const __m512i top =
            _mm512_maskz_srli_epi32(0xaaaa, _mm512_shuffle_epi32(blocks, _MM_PERM_CABA), 2);
        const __m512i places = _mm512_set1_epi64(0x0f0f0f0f3f3f3f3f);
        const __m512i whole = _mm512_and_si512(_mm512_ternarylogic_epi32(places, low, top, 0xca),
                                               _mm512_set1_epi8(63));
        const __m512i apart =
            _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), whole);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(scales), _mm512_castsi512_si256(apart));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(minima),
                            _mm512_extracti64x4_epi64(apart, 1));
    }
    // The two float16 in the first word of each of four blocks.
    static Vec first_halves(Words blocks) {
        const __m512i words = _mm512_permutexvar_epi32(
            _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12), blocks);
        return _mm512_cvtph_ps(_mm512_castsi512_si256(words));
    }
    // The number that each of four blocks begins with.
    static Vec firsts(Words blocks, F16 /*type*/) {
        const __m512i halves = _mm512_permutexvar_epi16(
            _mm512_castsi128_si512(_mm_setr_epi16(0, 8, 16, 24, 0, 8, 16, 24)), blocks);
        return _mm512_castps128_ps512(_mm_cvtph_ps(_mm512_castsi512_si128(halves)));
    }
    static Vec firsts(Words blocks, E8M0 /*type*/) {
        const __m512i words =
            _mm512_permutexvar_epi32(_mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12)), blocks);
        return powers(_mm512_and_si512(words, _mm512_set1_epi32(255)));
    }
    // Of the first four bytes of each of four blocks, bits j and j + 16 become bits 0 and 4 of byte
    // j of 16 bytes.
    static Words spread_bits(Words blocks) {
        const __m512i bit = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201));
        const auto of_bytes = [&](int64_t first, int64_t second) {
            return _mm512_test_epi8_mask(
                bit, _mm512_shuffle_epi8(blocks, _mm512_mask_set1_epi64(
                                                     _mm512_set1_epi64(first * 0x0101010101010101),
                                                     0xaa, second * 0x0101010101010101)));
        };
        const __m512i low = _mm512_maskz_set1_epi8(of_bytes(0, 1), 1);
        return _mm512_or_si512(low, _mm512_maskz_set1_epi8(of_bytes(2, 3), 16));
    }
    static Words load_bytes(const std::byte* p, int shift = 0) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm512_srli_epi32(_mm512_cvtepu8_epi32(bytes), static_cast<unsigned>(shift));
    }
    template <int kShift>
    static Vec look_up(Words words, const float (&table)[16]) {
        return _mm512_permutexvar_ps(_mm512_srli_epi32(words, kShift), _mm512_loadu_ps(table));
    }

    // The exponents of 16 codes at their places in bf16, twice: so the fifth bit of a code does not
    // matter. The last code stands for 0.
    static Words exponents(unsigned base) {
        const __m256i codes =
            _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0);
        const __m256i sums =
            _mm256_maskz_add_epi16(0x7fff, codes, _mm256_set1_epi16(static_cast<int16_t>(base)));
        return _mm512_broadcast_i64x4(_mm256_srli_epi16(_mm256_slli_epi16(sums, 8), 1));
    }
    // 64 numbers: 32 bytes of codes, and then a byte for each with its sign and its fraction.
    static void expand(Words exponents, const std::byte* from, BF16* to) {
        const Words codes = words_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        store_number(to, from + 32, _mm512_permutexvar_epi16(codes, exponents));
        store_number(to + 32, from + 64,
                     _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), exponents));
    }
    static Words words_of(__m256i bytes) { return _mm512_cvtepu8_epi16(bytes); }
    static void store_number(BF16* to, const std::byte* from, Words exponents) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        // What the mask takes of the bytes, which have their sign in all upper bits, or an
        // exponent.
        _mm512_storeu_si512(
            to, _mm512_ternarylogic_epi32(_mm512_cvtepi8_epi16(bytes), _mm512_set1_epi16(-0x7f81),
                                          exponents, 0xea));
    }

    // The lower (kUpper = 0) or upper bytes of 32 words as bf16. Exponent and mantissa are moved to
    // their places, and 120 is added to the exponent. Subnormal numbers (exponent 0, mantissa m:
    // m * 2^-9) get another number added, because bf16 products take subnormal bf16 for zero.
    template <size_t kUpper>
    static Words bf16_of(Words words, E4M3 /*format*/) {
        constexpr int16_t kNormal = 120 << 7;
        const __m512i subnormal = _mm512_broadcast_i32x4(
            _mm_setr_epi16(0, 0x3b00 - 0x10, 0x3b80 - 0x20, 0x3bc0 - 0x30, 0x3c00 - 0x40,
                           0x3c20 - 0x50, 0x3c40 - 0x60, 0x3c60 - 0x70));
        const __m512i top = kUpper == 0 ? _mm512_slli_epi16(words, 8) : words;
        const __m512i byte = kUpper == 0 ? words : _mm512_srli_epi16(words, 8);
        const __m512i moved =
            _mm512_and_si512(_mm512_srai_epi16(top, 4), _mm512_set1_epi16(-0x7810));
        const __mmask32 small = _mm512_testn_epi16_mask(moved, _mm512_set1_epi16(0x0780));
        const __m512i add =
            _mm512_mask_permutexvar_epi16(_mm512_set1_epi16(kNormal), small, byte, subnormal);
        return _mm512_add_epi16(moved, add);
    }
    // Byte kPart of 16 words of 32 bits.
    template <size_t kPart>
    static Vec byte(Words words, E4M3 format) {
        const __m512i pair = bf16_of<kPart % 2>(words, format);
        return numbers(kPart < 2 ? _mm512_slli_epi32(pair, 16)
                                 : _mm512_and_si512(pair, _mm512_set1_epi32(-0x10000)));
    }

    // Lane l gets p[lanes[l]]; reads 16 floats.
    using Lanes = __m512i;
    static Lanes lanes(const int32_t* p) { return _mm512_loadu_si512(p); }
    static Vec spread(const float* p, Lanes lanes) {
        return _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(p));
    }

    // To the nearest bf16, ties to even. A NaN keeps its upper bits and becomes quiet, because
    // rounding could make it an infinity.
    static __m256i narrow(Vec v) {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded =
            _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        return _mm512_cvtepi32_epi16(
            _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
    }
    static __m256i half(Vec v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

    static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
    static void store_in_turn(float* p, Vec a, Vec b) {
        const __m512i first =
            _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        store(p, _mm512_permutex2var_ps(a, first, b));
        store(p + 16, _mm512_permutex2var_ps(a, second, b));
    }
    static void store(BF16* p, Vec v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v));
    }
    static void store(F16* p, Vec v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half(v));
    }
    static void store_first(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
    static void store_first(BF16* p, Vec v, int64_t n) {
        _mm256_mask_storeu_epi16(p, first(n), narrow(v));
    }
    static void store_first(F16* p, Vec v, int64_t n) {
        _mm256_mask_storeu_epi16(p, first(n), half(v));
    }

    static Vec splat(float value) { return _mm512_set1_ps(value); }
    static Vec splat(F16 value) {
        return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(value.bits)));
    }
    static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
    static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
    static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
    static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where either is NaN
    static Vec clamp(Vec x, float low, float high) {              // keeps NaN
        return _mm512_min_ps(splat(high), _mm512_max_ps(splat(low), x));
    }
    static Vec round(Vec x) {
        return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    // 2^n for a whole n in [-126, 127]: adding 1.5 * 2^23 leaves n in the lowest bits.
    static Vec pow2(Vec n) {
        const __m512i bits = _mm512_castps_si512(_mm512_add_ps(n, splat(12582912.0f)));
        return _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(127)), 23));
    }
    static Vec where_negative(Vec x, Vec yes, Vec no) {
        return _mm512_mask_mov_ps(no, _mm512_movepi32_mask(_mm512_castps_si512(x)), yes);
    }

    // Lane l is added to l + 8, then l + 4, l + 2, l + 1, whichever position a vector is given in.
    static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
        const Vec ab = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        const Vec cd = add(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
        Vec s = add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
        s = add(s, _mm512_permute_ps(s, 0x4e));
        s = add(s, _mm512_permute_ps(s, 0xb1));
        const __m512i lanes = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
        _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(lanes, s)));
    }
};

}  // namespace
}  // namespace moeinf
