// How packed weights become bf16, without loss, for the matrix unit of x86: 32 columns of a row at
// a time. Included only by packed_panel.h; unnamed for the reason float_math.h gives.
//
// A type of codes has kBytes, the bytes of kPanelDepth columns of a row, and
//
//   load(row, k, n)   columns k to k + n of a row; k a multiple of 32, n <= 32
//
// `row` points to a multiple of kPanelDepth columns. Columns behind the n become any finite
// numbers, and no byte of theirs is read. Codes that may have zero points name the Zeroed ones,
// whose load takes what zero(z) made of the zero point of each half of the columns.
//
// Folded codes are multiplied by their scales here, because the products are exact in bf16 too.
// They have kFolded, the columns of a scale, and load(row, k, n, scales, far). The scales of a row
// are bytes, from that of its first column on; codes in blocks have their own. Powers of two that
// could leave the range of bf16 set `far`: then the Plain codes serve.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "cpu_kernels/formats/decoders.h"
#include "cpu_kernels/tiles_amx.h"

namespace moeinf {
namespace {

using F = Floats512;

constexpr int64_t kPanelDepth = 256;  // columns of a row that are decoded at a time

struct alignas(64) Table {
    uint16_t numbers[64];
    // Of the lower five or six bits of each word.
    [[nodiscard]] __m512i of_five(__m512i words) const {
        return _mm512_permutexvar_epi16(words, _mm512_load_si512(numbers));
    }
    [[nodiscard]] __m512i of_six(__m512i words) const {
        return _mm512_permutex2var_epi16(_mm512_load_si512(numbers), words,
                                         _mm512_load_si512(numbers + 32));
    }
};

constexpr uint16_t upper_half(float value) {
    return static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
}

// The number of each code as bf16. With codes of four bits, a fifth bit changes nothing.
template <class Decoder>
constexpr Table make_table() {
    Table table{};
    for (size_t i = 0; i < 64; ++i) {
        float value = Decoder::kTable[i % 16];
        if constexpr (requires { Decoder::kHighTable; }) value += Decoder::kHighTable[i / 16];
        table.numbers[i] = upper_half(value);
    }
    return table;
}
template <class Decoder>
constexpr Table kTableOf = make_table<Decoder>();

// Integers of four bits less others: i stands for i - 15.
constexpr Table make_differences() {
    Table table{};
    for (int i = 0; i < 31; ++i) table.numbers[i] = upper_half(static_cast<float>(i - 15));
    return table;
}
constexpr Table kDifferences = make_differences();

inline __m512i bytes_as_words(const std::byte* p) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline __m512i two_halves(int first, int second) {
    return _mm512_mask_set1_epi16(_mm512_set1_epi16(static_cast<int16_t>(first)), 0xffff0000u,
                                  static_cast<int16_t>(second));
}

struct E4M3Codes {
    static constexpr int64_t kBytes = kPanelDepth;
    static __m512i load(const std::byte* row, int64_t k, int64_t n) {
        const auto mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
        const __m256i bytes = _mm256_maskz_loadu_epi8(mask, row + k);
        return F::bf16_of<0>(_mm512_cvtepu8_epi16(bytes), E4M3{});
    }
};

struct ZeroedInt8Codes {
    static constexpr int64_t kBytes = kPanelDepth;
    static __m512i zero(int first, int second) { return two_halves(first, second); }
    static __m512i load(const std::byte* row, int64_t k, int64_t n, __m512i zero) {
        const auto mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
        const __m256i bytes = _mm256_maskz_loadu_epi8(mask, row + k);
        const __m512i words = _mm512_sub_epi16(_mm512_cvtepi8_epi16(bytes), zero);
        const auto half = [&](__m256i sixteen) {
            return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(sixteen));
        };
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(
            half(_mm512_extracti64x4_epi64(words, 1)), half(_mm512_castsi512_si256(words))));
    }
};

struct Int8Codes {
    using Zeroed = ZeroedInt8Codes;
    static constexpr int64_t kBytes = kPanelDepth;
    static __m512i load(const std::byte* row, int64_t k, int64_t n) {
        const auto* from = reinterpret_cast<const int8_t*>(row) + k;
        const auto second = [&] {
            if (n == kTileDepth) return F::load(from + 16);
            return n > 16 ? F::load_first(from + 16, n - 16) : F::splat(0.0f);
        };
        return reinterpret_cast<__m512i>(
            _mm512_cvtne2ps_pbh(second(), n >= 16 ? F::load(from) : F::load_first(from, n)));
    }
};

// Two columns in a byte, the first one in its lower half. Each word has the bits of one column,
// and others above them.
inline __m512i nibbles(const std::byte* row, int64_t k, int64_t n) {
    const auto mask = static_cast<__mmask16>((1u << (n / 2)) - 1u);
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, row + k / 2));
    return _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
}

struct E2M1Codes {
    static constexpr int64_t kBytes = kPanelDepth / 2;
    static __m512i load(const std::byte* row, int64_t k, int64_t n) {
        return kTableOf<E2M1Weights>.of_five(nibbles(row, k, n));
    }
};

// The product of each scale, by its byte, with each code.
struct alignas(64) Products {
    uint16_t of[256][16];
};
constexpr Products make_nvfp4_products() {
    Products products{};
    for (int scale = 0; scale < 256; ++scale) {
        const int exponent = scale >> 3 & 15;
        float value = static_cast<float>((exponent == 0 ? 0 : 8) + (scale & 7)) / 512;
        for (int i = 1; i < exponent; ++i) value *= 2;
        if (scale >= 128) value = -value;
        const bool number = (scale & 127) != 127;
        for (int code = 0; code < 16; ++code) {
            products.of[scale][code] =
                number ? upper_half(value * E2M1Weights::kTable[code]) : 0x7fc0;
        }
    }
    return products;
}
constexpr Products kNvfp4Products = make_nvfp4_products();

// Powers of two from 2^-30 to 2^30 keep every product in the range of bf16, and its product with an
// activation too: the matrix unit takes numbers below 2^-126 for zero, so one of 2^-94 is the
// least.
constexpr int kLeastPower = 97, kMostPower = 157;
inline bool is_far(uint8_t power) {
    return power < kLeastPower || power > kMostPower;
}
constexpr Products make_mxfp4_products() {
    Products products{};
    float value = 1.0f / (int64_t{1} << 30);
    for (int power = kLeastPower; power <= kMostPower; ++power, value *= 2) {
        for (int code = 0; code < 16; ++code) {
            products.of[power][code] = upper_half(value * E2M1Weights::kTable[code]);
        }
    }
    return products;
}
constexpr Products kMxfp4Products = make_mxfp4_products();

inline __m512i mxfp4_table(uint8_t power) {
    const auto* products = kMxfp4Products.of[power];
    return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(products)));
}

// Codes have 2 significant bits, their scales 4: the products have 6.
struct Nvfp4Codes {
    static constexpr int64_t kBytes = kPanelDepth / 2;
    static constexpr int64_t kFolded = 16;  // columns of a scale

    static __m512i load(const std::byte* row, int64_t k, int64_t n, const std::byte* scales,
                        bool& /*far*/) {
        const auto table = [&](int64_t group) {
            const auto* products = kNvfp4Products.of[static_cast<uint8_t>(scales[group])];
            return _mm256_load_si256(reinterpret_cast<const __m256i*>(products));
        };
        const int64_t first = k / kFolded;
        const __m512i two = _mm512_inserti64x4(_mm512_castsi256_si512(table(first)),
                                               table(n > kFolded ? first + 1 : first), 1);
        const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
        // The lower four bits of each code, or the second table.
        const __m512i places =
            _mm512_ternarylogic_epi32(nibbles(row, k, n), _mm512_set1_epi16(15), second, 0xea);
        return _mm512_permutexvar_epi16(places, two);
    }
};

struct Mxfp4Codes {
    using Plain = E2M1Codes;
    static constexpr int64_t kBytes = kPanelDepth / 2;
    static constexpr int64_t kFolded = 32;
    static __m512i load(const std::byte* row, int64_t k, int64_t n, const std::byte* scales,
                        bool& far) {
        const auto power = static_cast<uint8_t>(scales[k / kFolded]);
        far |= is_far(power);
        return _mm512_permutexvar_epi16(nibbles(row, k, n), mxfp4_table(power));
    }
};

struct Mxfp8Codes {
    using Plain = E4M3Codes;
    static constexpr int64_t kBytes = kPanelDepth;
    static constexpr int64_t kFolded = 32;
    static __m512i load(const std::byte* row, int64_t k, int64_t n, const std::byte* scales,
                        bool& far) {
        const auto power = static_cast<uint8_t>(scales[k / kFolded]);
        far |= is_far(power);
        const __m512i codes = E4M3Codes::load(row, k, n);
        const __mmask32 not_zero = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x7fff));
        return _mm512_mask_add_epi16(codes, not_zero, codes,
                                     _mm512_set1_epi16(static_cast<int16_t>((power - 127) * 128)));
    }
};

struct ZeroedInt4Codes {
    static constexpr int64_t kBytes = kPanelDepth / 2;
    // The zero point z, from -8 to 7, and the code c stand for c - 8 - z, at place c + 7 - z.
    static __m512i zero(int first, int second) { return two_halves(7 - first, 7 - second); }
    static __m512i load(const std::byte* row, int64_t k, int64_t n, __m512i zero) {
        const __m512i codes = _mm512_and_si512(nibbles(row, k, n), _mm512_set1_epi16(15));
        return kDifferences.of_five(_mm512_add_epi16(codes, zero));
    }
};

struct Int4Codes {
    using Zeroed = ZeroedInt4Codes;
    static constexpr int64_t kBytes = kPanelDepth / 2;
    static __m512i load(const std::byte* row, int64_t k, int64_t n) {
        return kTableOf<Int4Weights>.of_five(nibbles(row, k, n));
    }
};

}  // namespace
}  // namespace moeinf
