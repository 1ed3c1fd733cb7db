// The codes of tile_codes.h in blocks that have their own scales (cpu_kernels/formats/ggml.h).
// Included only by packed_panel.h; unnamed for the reason float_math.h gives.
//
// They have kGroup, the columns that share a scale, and
//
//   scales(row, n, to)   the scales of n columns; behind them, from kMinima on, their minima
//
// Their n is whole blocks. The scales of other codes lie beside them.
#pragma once

#include "cpu_kernels/tile_codes.h"

namespace moeinf {
namespace {

// The first number of each block of 32 columns, and the two bytes behind it. Blocks have more than
// four bytes.
template <int64_t kSize>
__m256i first_words(const std::byte* row, int64_t n) {
    const __m256i places =
        _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(kSize));
    const auto blocks = static_cast<__mmask8>((1u << (n / 32)) - 1u);
    return _mm256_mmask_i32gather_epi32(_mm256_setzero_si256(), blocks, places, row, 1);
}

inline __m256 lower_halves(__m256i words) {
    return _mm256_cvtph_ps(_mm256_cvtepi32_epi16(words));
}

template <class D>
struct BlockCodes {
    static constexpr auto kSize = static_cast<int64_t>(sizeof(typename D::Stored));
    static constexpr int64_t kBytes = kPanelDepth / D::kPack * kSize;
    static constexpr int64_t kGroup = D::kGroup;
    static constexpr int64_t kMinima = D::kMinima ? kPanelDepth / kGroup : 0;

    static const std::byte* block(const std::byte* row, int64_t k) {
        return row + k / D::kPack * kSize;
    }
};

template <class D>
struct HalfScaled : BlockCodes<D> {
    static void scales(const std::byte* row, int64_t n, float* to) {
        const __m256i words = first_words<BlockCodes<D>::kSize>(row, n);
        _mm256_storeu_ps(to, lower_halves(words));
        if constexpr (D::kMinima) {  // a number that is added
            const __m256 added = lower_halves(_mm256_srli_epi32(words, 16));
            _mm256_storeu_ps(to + 8, _mm256_xor_ps(added, _mm256_set1_ps(-0.0f)));
        }
    }
};

template <class D>
struct PowerScaled : BlockCodes<D> {
    static void scales(const std::byte* row, int64_t n, float* to) {
        const __m128i bytes = _mm256_cvtepi32_epi8(first_words<BlockCodes<D>::kSize>(row, n));
        F::store(to, F::powers(bytes));
    }
};

struct Q80Codes : HalfScaled<Q80Weights> {
    static __m512i load(const std::byte* row, int64_t k, int64_t /*n*/) {
        return Int8Codes::load(block(row, k) + Q80Weights::kFirst, 0, kTileDepth);
    }
};

// The lower halves of 16 bytes, then their upper halves.
inline __m512i halves_of(__m128i bytes) {
    const __m256i words = _mm256_cvtepu8_epi16(bytes);
    return _mm512_inserti64x4(_mm512_castsi256_si512(words), _mm256_srli_epi16(words, 4), 1);
}

// Blocks of 32 columns: the first 16 in the lower halves of 16 bytes. A fifth bit of column j is
// bit j of four bytes.
template <class D, class Base = HalfScaled<D>>
struct SmallBlockCodes : Base {
    // The lower four bits of each word, and others above them.
    static __m512i codes(const std::byte* block) { return halves_of(F::bytes(block + D::kFirst)); }
    static __m512i load(const std::byte* row, int64_t k, int64_t /*n*/) {
        const std::byte* block = Base::block(row, k);
        if constexpr (D::kHighBits == 0) {
            return kTableOf<D>.of_five(codes(block));
        } else {
            __mmask32 fifth;
            std::memcpy(&fifth, block + D::kHigh, sizeof fifth);
            const __m512i lower = _mm512_and_si512(codes(block), _mm512_set1_epi16(15));
            return kTableOf<D>.of_five(
                _mm512_mask_add_epi16(lower, fifth, lower, _mm512_set1_epi16(16)));
        }
    }
};

struct GgufMxfp4Codes {
    using Plain = SmallBlockCodes<Mxfp4Weights, PowerScaled<Mxfp4Weights>>;
    static constexpr int64_t kBytes = Plain::kBytes;
    static constexpr int64_t kFolded = 32;
    static __m512i load(const std::byte* row, int64_t k, int64_t /*n*/, const std::byte* /*scales*/,
                        bool& far) {
        const std::byte* block = Plain::block(row, k);
        const auto power = static_cast<uint8_t>(*block);
        far |= is_far(power);
        return _mm512_permutexvar_epi16(Plain::codes(block), mxfp4_table(power));
    }
};

// Words of 16 bits: the lower four of `codes`, all others of `high`.
inline __m512i with_high_bits(__m512i codes, __m512i high) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), codes, high, 0xca);
}

// Eight groups with whole numbers of six bits for scales and minima, times a float16 for each.
template <class D>
struct SixBitScaled : BlockCodes<D> {
    static void scales(const std::byte* row, int64_t /*n*/, float* to) {
        constexpr uint32_t kLow4 = 0x0f0f0f0f;
        constexpr uint32_t kLow6 = 0x3f3f3f3f;
        constexpr uint32_t kTop2 = 0x30303030;
        uint32_t in[4];
        std::memcpy(in, row, sizeof in);
        const __m128i whole =
            _mm_setr_epi32(static_cast<int>(in[1] & kLow6),
                           static_cast<int>((in[3] & kLow4) | (in[1] >> 2 & kTop2)),
                           static_cast<int>(in[2] & kLow6),
                           static_cast<int>((in[3] >> 4 & kLow4) | (in[2] >> 2 & kTop2)));
        const __m128 two = _mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(in[0])));
        const __m512 factors = _mm512_mask_broadcastss_ps(_mm512_broadcastss_ps(two), 0xff00,
                                                          _mm_shuffle_ps(two, two, 1));
        F::store(to, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(whole)), factors));
    }
};

// Blocks of 256 columns. Of 64 columns, the first 32 are in the lower halves of 32 bytes. Their
// fifth bits are bits 2c and 2c + 1 of 32 other bytes, where c counts the 64 columns.
template <class D>
struct LargeBlockCodes : SixBitScaled<D> {
    static __m512i load(const std::byte* row, int64_t k, int64_t /*n*/) {
        const __m512i bytes = bytes_as_words(row + D::kFirst + k / 64 * 32);
        const __m512i codes = k % 64 == 0 ? bytes : _mm512_srli_epi16(bytes, 4);
        if constexpr (D::kHighBits == 0) {
            return kTableOf<D>.of_five(codes);
        } else {
            const auto bit = static_cast<unsigned>(k / 32);
            const __m512i high = bytes_as_words(row + D::kHigh);
            return kTableOf<D>.of_five(
                with_high_bits(codes, bit <= 4 ? _mm512_slli_epi16(high, (4 - bit) & 15)
                                               : _mm512_srli_epi16(high, (bit - 4) & 15)));
        }
    }
};

// 16 whole numbers times a float16.
inline void whole_times(const int8_t* whole, const std::byte* half, float* to) {
    F16 factor;
    std::memcpy(&factor, half, sizeof factor);
    const __m128 number = _mm_cvtph_ps(_mm_cvtsi32_si128(factor.bits));
    F::store(to, F::mul(F::load(whole), _mm512_broadcastss_ps(number)));
}

// Blocks of 256 columns. Of 32 columns, the first 16 are in the lower halves of 16 bytes.
struct Iq4XsCodes : BlockCodes<Iq4XsWeights> {
    static void scales(const std::byte* row, int64_t /*n*/, float* to) {
        int8_t whole[16] = {};
        Iq4XsWeights::whole_scales(row, whole);
        whole_times(whole, row, to);
    }
    static __m512i load(const std::byte* row, int64_t k, int64_t /*n*/) {
        return kTableOf<Iq4XsWeights>.of_five(
            halves_of(F::bytes(row + Iq4XsWeights::kFirst + k / 2)));
    }
};

// Blocks of 256 columns. Of 128 columns, 32 are in each pair of bits of 32 bytes. Their third bits
// are in 32 other bytes, a bit for each 32 columns.
struct Q3KCodes : BlockCodes<Q3KWeights> {
    using D = Q3KWeights;
    static void scales(const std::byte* row, int64_t /*n*/, float* to) {
        int8_t whole[16];
        D::whole_scales(row, whole);
        whole_times(whole, row + 108, to);
    }
    static __m512i load(const std::byte* row, int64_t k, int64_t /*n*/) {
        const auto group = static_cast<unsigned>(k / 32);
        const __m512i pairs = bytes_as_words(row + D::kFirst + k / 128 * 32);
        const __m512i high = _mm512_slli_epi16(bytes_as_words(row + D::kHigh), 4);
        return kTableOf<D>.of_five(with_high_bits(_mm512_srli_epi16(pairs, group % 4 * 2),
                                                  _mm512_srli_epi16(high, group)));
    }
};

// Blocks of 256 columns. Of 128 columns, the first 64 are in the lower halves of 64 bytes. Their
// other two bits are in 32 other bytes, those of columns at a distance of 32 side by side.
struct Q6KCodes : BlockCodes<Q6KWeights> {
    using D = Q6KWeights;
    static void scales(const std::byte* row, int64_t /*n*/, float* to) {
        whole_times(reinterpret_cast<const int8_t*>(row + 192), row + 208, to);
    }
    static __m512i load(const std::byte* row, int64_t k, int64_t /*n*/) {
        const int64_t part = k / 128;
        const auto place = static_cast<unsigned>(k % 128 / 32);
        const __m512i bytes = bytes_as_words(row + D::kFirst + part * 64 + place % 2 * 32);
        const __m512i high = bytes_as_words(row + D::kHigh + part * 32);
        return kTableOf<D>.of_six(
            with_high_bits(place < 2 ? bytes : _mm512_srli_epi16(bytes, 4),
                           place < 2 ? _mm512_slli_epi16(high, (4 - 2 * place) & 15)
                                     : _mm512_srli_epi16(high, (2 * place - 4) & 15)));
    }
};

}  // namespace
}  // namespace moeinf
