// Four floats in the vector extension of GCC and Clang, which every target lowers to what it has;
// see avx512.h. Included only by kernels_portable.cpp.
#pragma once

#include "base/dtype.h"

namespace moeinf {
namespace {

struct Floats128 {
    using Vec = float __attribute__((vector_size(16)));
    using Bits = uint32_t __attribute__((vector_size(16)));
    static constexpr int64_t kLanes = 4;
    static constexpr int kTileRows = 2;
    static constexpr int kTileOutputs = 4;

    static Vec numbers(Bits bits) {
        Vec v;
        __builtin_memcpy(&v, &bits, sizeof v);
        return v;
    }
    static Bits bits_of(Vec v) {
        Bits bits;
        __builtin_memcpy(&bits, &v, sizeof bits);
        return bits;
    }
    template <class T>
    static Bits bits16(const T* p) {
        return Bits{p[0].bits, p[1].bits, p[2].bits, p[3].bits};
    }
    template <class T>
    static void store16(T* p, Bits bits) {
        for (int i = 0; i < 4; ++i) p[i].bits = static_cast<uint16_t>(bits[i]);
    }
    static Bits choose(Bits mask, Bits yes, Bits no) { return (yes & mask) | (no & ~mask); }
    template <class Mask>
    static Bits mask_of(Mask mask) {
        Bits bits;
        __builtin_memcpy(&bits, &mask, sizeof bits);
        return bits;
    }
    template <class T>
    static Vec load_copy(const T* p, int64_t n) {
        T buffer[4] = {};
        for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
        return load(buffer);
    }
    template <class T>
    static void store_copy(T* p, Vec v, int64_t n) {
        T buffer[4];
        store(buffer, v);
        for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
    }

    static Vec load(const float* p) {
        Vec v;
        __builtin_memcpy(&v, p, sizeof v);
        return v;
    }
    static Vec load(const BF16* p) { return numbers(bits16(p) << 16); }
    // Exponent and mantissa moved to their places and scaled by 2^112: exact, subnormals included;
    // the largest exponent is set anew, for it means infinity or NaN.
    static Vec load(const F16* p) {
        const Bits half = bits16(p);
        const Bits magnitude = (half & 0x7fffu) << 13;
        const Bits finite = bits_of(numbers(magnitude) * splat(0x1p112f));
        const Bits special = mask_of((half & 0x7c00u) == 0x7c00u);
        return numbers(choose(special, magnitude | 0x7f800000u, finite) | (half & 0x8000u) << 16);
    }
    template <class T>
    static Bits bits8(const T* p) {
        return Bits{p[0].bits, p[1].bits, p[2].bits, p[3].bits};
    }
    // 2^(b - 127) has exponent b, except for b = 0.
    static Vec load(const E8M0* p) {
        const Bits b = bits8(p);
        return numbers(choose(mask_of(b == 0u), Bits{} + 0x00400000u, b << 23));
    }
    // Exponent and mantissa at their places, and the exponent corrected by 2^120.
    static Vec load(const E4M3* p) {
        const Bits b = bits8(p);
        const Bits size = bits_of(numbers((b & 0x7fu) << 20) * splat(0x1p120f));
        return numbers(size | (b & 0x80u) << 24);
    }
    static Vec load(const int8_t* p) {
        return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                   static_cast<float>(p[3])};
    }
    static Vec load_first(const float* p, int64_t n) { return load_copy(p, n); }
    static Vec load_first(const E8M0* p, int64_t n) { return load_copy(p, n); }
    static Vec load_first(const E4M3* p, int64_t n) { return load_copy(p, n); }
    static Vec load_first(const int8_t* p, int64_t n) { return load_copy(p, n); }
    static Vec load_first(const BF16* p, int64_t n) { return load_copy(p, n); }
    static Vec load_first(const F16* p, int64_t n) { return load_copy(p, n); }

    // 16 bytes as 4 words, and the float that a table has for four bits of each word.
    using Words = Bits;
    static Words load_words(const std::byte* p) {
        Words words;
        __builtin_memcpy(&words, p, sizeof words);
        return words;
    }
    static Words load_words_first(const std::byte* p, int64_t nbytes) {  // nbytes < 16
        Words words{};
        __builtin_memcpy(&words, p, static_cast<size_t>(nbytes));
        return words;
    }
    static Words load_quarters(const std::byte* p, int64_t /*stride*/) { return load_words(p); }
    static Words load_quarters_first(const std::byte* p, int64_t /*stride*/, int64_t /*n*/) {
        return load_words(p);
    }
    template <int /*kMore*/>
    static Words load_shifted(const std::byte* p, int shift) {
        return load_words(p) >> static_cast<uint32_t>(shift);
    }
    // See SixBitScales: of the first 16 bytes of a block.
    static void six_bits(Words block, int8_t* scales, int8_t* minima) {
        const Words low = {block[1], block[3], block[2], block[3] >> 4};
        const Words top = {0, block[1], 0, block[2]};
        const Words whole = (low & Words{0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f}) |
                            (top >> 2 & (Bits{} + 0x30303030u));
        __builtin_memcpy(scales, &whole, 8);
        __builtin_memcpy(minima, reinterpret_cast<const int8_t*>(&whole) + 8, 8);
    }
    // The two float16 in the first word of a block.
    static Vec first_halves(Words block) {
        const Words words = {block[0], block[0], block[0], block[0]};
        F16 halves[4];
        __builtin_memcpy(halves, &words, sizeof halves);
        return load(halves);
    }
    // A byte for each word, shifted.
    static Words load_bytes(const std::byte* p, int shift = 0) {
        const Words words = {static_cast<uint32_t>(p[0]), static_cast<uint32_t>(p[1]),
                             static_cast<uint32_t>(p[2]), static_cast<uint32_t>(p[3])};
        return words >> static_cast<uint32_t>(shift);
    }
    template <int kShift>
    static Vec look_up(Words words, const float (&table)[16]) {
        const Words at = words >> kShift & 15u;
        return Vec{table[at[0]], table[at[1]], table[at[2]], table[at[3]]};
    }

    // Lane l gets p[lanes[l]].
    using Lanes = Bits;
    static Lanes lanes(const int32_t* p) {
        Lanes lanes;
        __builtin_memcpy(&lanes, p, sizeof lanes);
        return lanes;
    }
    static Vec spread(const float* p, Lanes lanes) {
        return Vec{p[lanes[0]], p[lanes[1]], p[lanes[2]], p[lanes[3]]};
    }

    static void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
    // The elements of a and b in turn.
    static void store_in_turn(float* p, Vec a, Vec b) {
        store(p, Vec{a[0], b[0], a[1], b[1]});
        store(p + 4, Vec{a[2], b[2], a[3], b[3]});
    }
    // To the nearest, ties to even; a NaN is made quiet and stays one.
    static void store(BF16* p, Vec v) {
        const Bits bits = bits_of(v);
        const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
        store16(p, choose(mask_of(v != v), bits | 0x00400000u, rounded) >> 16);
    }
    // Normal numbers round in their bits after the exponent is moved down by 112; smaller ones by
    // the addition of 0.5, whose last place is the smallest half; what is too large is infinite.
    static void store(F16* p, Vec v) {
        const Bits bits = bits_of(v);
        const Bits sign = (bits >> 16) & 0x8000u;
        const Bits size = bits & 0x7fffffffu;
        const Bits normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
        const Bits small = bits_of(numbers(size) + splat(0.5f)) - 0x3f000000u;
        Bits half = choose(mask_of(size < (113u << 23)), small, normal);
        half = choose(mask_of(size >= (143u << 23)), Bits{} + 0x7c00u, half);
        half = choose(mask_of(size > 0x7f800000u), 0x7e00u | ((size >> 13) & 0x3ffu), half);
        store16(p, half | sign);
    }
    static void store_first(float* p, Vec v, int64_t n) { store_copy(p, v, n); }
    static void store_first(BF16* p, Vec v, int64_t n) { store_copy(p, v, n); }
    static void store_first(F16* p, Vec v, int64_t n) { store_copy(p, v, n); }

    static Vec splat(float value) { return Vec{value, value, value, value}; }
    static Vec splat(F16 value) {
        const F16 values[4] = {value, value, value, value};
        return load(values);
    }
    static Vec add(Vec a, Vec b) { return a + b; }
    static Vec sub(Vec a, Vec b) { return a - b; }
    static Vec mul(Vec a, Vec b) { return a * b; }
    static Vec div(Vec a, Vec b) { return a / b; }
    static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // rounds twice, on every target
    static Vec max(Vec a, Vec b) { return numbers(choose(mask_of(a > b), bits_of(a), bits_of(b))); }
    static Vec clamp(Vec x, float low, float high) {  // keeps NaN
        const Bits capped = choose(mask_of(x > splat(high)), bits_of(splat(high)), bits_of(x));
        return numbers(choose(mask_of(x < splat(low)), bits_of(splat(low)), capped));
    }
    static Vec round(Vec x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }
    // 2^n for a whole n in [-126, 127]: adding 1.5 * 2^23 leaves n in the lowest bits.
    static Vec pow2(Vec n) { return numbers((bits_of(n + splat(12582912.0f)) + 127u) << 23); }
    static Vec where_negative(Vec x, Vec yes, Vec no) {
        return numbers(choose(mask_of((bits_of(x) >> 31) == 1u), bits_of(yes), bits_of(no)));
    }

    // Lane l is added to l + 2, then to l + 1.
    static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
        const Vec all[4] = {a, b, c, d};
        for (int i = 0; i < 4; ++i) out[i] = (all[i][0] + all[i][2]) + (all[i][1] + all[i][3]);
    }
};

}  // namespace
}  // namespace moeinf
