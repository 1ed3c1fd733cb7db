// Eight floats in an AVX2 register; see avx512.h. Included only by kernels_avx2.cpp.
#pragma once

#include <immintrin.h>

#include "base/dtype.h"

namespace moeinf {
namespace {

struct Floats256 {
    using Vec = __m256;
    static constexpr int64_t kLanes = 8;
    static constexpr int kTileRows = 3;
    static constexpr int kTileOutputs = 4;

    static Vec widen(__m128i bf16) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
    }
    static __m128i halves(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
    // The first n < 8 elements through a buffer, so that nothing beyond them is touched.
    template <class T>
    static Vec load_copy(const T* p, int64_t n) {
        T buffer[8] = {};
        for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
        return load(buffer);
    }
    template <class T>
    static void store_copy(T* p, Vec v, int64_t n) {
        T buffer[8];
        store(buffer, v);
        for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
    }

    static Vec load(const float* p) { return _mm256_loadu_ps(p); }
    static Vec load(const BF16* p) { return widen(halves(p)); }
    static Vec load(const F16* p) { return _mm256_cvtph_ps(halves(p)); }
    static __m128i bytes(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
    // 2^(b - 127) has exponent b, except for b = 0.
    static Vec load(const E8M0* p) {
        const __m256i b = _mm256_cvtepu8_epi32(bytes(p));
        const __m256i zero = _mm256_cmpeq_epi32(b, _mm256_setzero_si256());
        const __m256i tiny = _mm256_and_si256(zero, _mm256_set1_epi32(0x00400000));
        return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(b, 23), tiny));
    }
    // Moved by 7 bits, an e4m3 number is a half 2^8 times as small.
    static Vec load(const E4M3* p) {
        const __m128i moved = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes(p)), 7);
        const __m128i half = _mm_and_si128(moved, _mm_set1_epi16(-0x4080));
        return _mm256_mul_ps(_mm256_cvtph_ps(half), splat(256.0f));
    }
    static Vec load(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes(p))); }
    static Vec load_first(const float* p, int64_t n) { return load_copy(p, n); }
    static Vec load_first(const E8M0* p, int64_t n) { return load_copy(p, n); }
    static Vec load_first(const E4M3* p, int64_t n) { return load_copy(p, n); }
    static Vec load_first(const int8_t* p, int64_t n) { return load_copy(p, n); }
    static Vec load_first(const BF16* p, int64_t n) { return load_copy(p, n); }
    static Vec load_first(const F16* p, int64_t n) { return load_copy(p, n); }

    // 32 bytes as 8 words, and the float that a table has for four bits of each word.
    using Words = __m256i;
    static Words load_words(const std::byte* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static Words load_words_first(const std::byte* p, int64_t nbytes) {  // nbytes < 32
        std::byte buffer[32] = {};
        for (int64_t i = 0; i < nbytes; ++i) buffer[i] = p[i];
        return load_words(buffer);
    }
    // Twice 16 bytes, at a distance; or the first n of them. And 32 bytes, shifted to the right.
    static Words load_quarters(const std::byte* p, int64_t stride) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(halves(p)), halves(p + stride), 1);
    }
    static Words load_quarters_first(const std::byte* p, int64_t stride, int64_t n) {
        return n > 1 ? load_quarters(p, stride) : _mm256_zextsi128_si256(halves(p));
    }
    template <int /*kMore*/>
    static Words load_shifted(const std::byte* p, int shift) {
        return _mm256_srli_epi32(load_words(p), shift);
    }
    // See SixBitScales: of the first 16 bytes of two blocks.
    static void six_bits(Words blocks, int8_t* scales, int8_t* minima) {
        const __m256i low = _mm256_srlv_epi32(_mm256_shuffle_epi32(blocks, 0xed),
                                              _mm256_setr_epi32(0, 0, 0, 4, 0, 0, 0, 4));
        const __m256i top = _mm256_srli_epi32(_mm256_shuffle_epi32(blocks, 0x84), 2);
        const __m256i whole =
            _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi64x(0x0f0f0f0f3f3f3f3f)),
                            _mm256_and_si256(top, _mm256_set1_epi64x(0x3030303000000000)));
        const __m256i apart = _mm256_permute4x64_epi64(whole, 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(scales), _mm256_castsi256_si128(apart));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(minima), _mm256_extracti128_si256(apart, 1));
    }
    // The two float16 in the first word of each of two blocks.
    static Vec first_halves(Words blocks) {
        const __m256i words =
            _mm256_permutevar8x32_epi32(blocks, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
        return _mm256_cvtph_ps(_mm256_castsi256_si128(words));
    }
    static Words load_bytes(const std::byte* p, int shift = 0) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        return _mm256_srli_epi32(_mm256_cvtepu8_epi32(bytes), shift);
    }
    template <int kShift>
    static Vec look_up(Words words, const float (&table)[16]) {
        const __m256i at = _mm256_srli_epi32(words, kShift);
        const Vec low = _mm256_permutevar8x32_ps(load(table), at);
        const Vec high = _mm256_permutevar8x32_ps(load(table + 8), at);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
    }

    // Lane l gets p[lanes[l]]; reads 8 floats.
    using Lanes = __m256i;
    static Lanes lanes(const int32_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static Vec spread(const float* p, Lanes lanes) {
        return _mm256_permutevar8x32_ps(load(p), lanes);
    }

    // To the nearest bf16, ties to even; a NaN is made quiet and stays one.
    static __m128i narrow(Vec v) {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded =
            _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
        return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    }

    static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
    static void store_in_turn(float* p, Vec a, Vec b) {
        const Vec low = _mm256_unpacklo_ps(a, b);
        const Vec high = _mm256_unpackhi_ps(a, b);
        store(p, _mm256_permute2f128_ps(low, high, 0x20));
        store(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
    }
    static void store(BF16* p, Vec v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v));
    }
    static void store(F16* p, Vec v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    static void store_first(float* p, Vec v, int64_t n) { store_copy(p, v, n); }
    static void store_first(BF16* p, Vec v, int64_t n) { store_copy(p, v, n); }
    static void store_first(F16* p, Vec v, int64_t n) { store_copy(p, v, n); }

    static Vec splat(float value) { return _mm256_set1_ps(value); }
    static Vec splat(F16 value) {
        return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(value.bits)));
    }
    static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
    static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
    static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
    static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
    static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // b where either is NaN
    static Vec clamp(Vec x, float low, float high) {              // keeps NaN
        return _mm256_min_ps(splat(high), _mm256_max_ps(splat(low), x));
    }
    static Vec round(Vec x) {
        return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    // 2^n for a whole n in [-126, 127]: adding 1.5 * 2^23 leaves n in the lowest bits.
    static Vec pow2(Vec n) {
        const __m256i bits = _mm256_castps_si256(_mm256_add_ps(n, splat(12582912.0f)));
        return _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(127)), 23));
    }
    static Vec where_negative(Vec x, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, x); }

    // Lane l is added to l + 4, then l + 2, then l + 1, whichever position a vector is given in.
    static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
        const Vec ab = add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
        const Vec cd = add(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
        // Lower half: a and c, upper half: b and d.
        Vec s = add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
        s = add(_mm256_shuffle_ps(s, s, 0x88), _mm256_shuffle_ps(s, s, 0xdd));
        _mm_storeu_ps(out, _mm_unpacklo_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
    }
};

}  // namespace
}  // namespace moeinf
