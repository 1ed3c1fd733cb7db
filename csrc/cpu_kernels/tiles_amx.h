// What the products on the matrix unit of x86 (AMX) share. Included only by *_amx.cpp; unnamed for
// the reason float_math.h gives.
//
// A tile has 16 rows of 64 bytes. Weights are 16 outputs by 32 elements of depth. Activations are
// arranged before, 16 of them at a time, so that a tile holds pairs of neighbouring elements of
// depth, one pair of each activation side by side. Four tiles of sums are kept: two of outputs by
// two of activations. The sum of an output has one order, whatever surrounds it: the depth from its
// beginning to its end.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu_kernels/kernels_isa.h"
#include "floats/avx512.h"

namespace moeinf {
namespace {

constexpr int64_t kLine = 64;                         // bytes of a row of a tile
constexpr int64_t kTileBytes = kTileRows * kLine;     // of a full one
constexpr int64_t kStreams = 2 * kTileBytes / kLine;  // cache lines of weights of a step
using Lines = __m512i[kTileRows];

// The tile registers, whose numbers are written in the instructions.
constexpr int kSums = 0;  // by 16 outputs and 16 activations: 0 + 0, 0 + 16, 16 + 0, 16 + 16
constexpr int kWeights = 4;
constexpr int kRows = 6;

struct alignas(64) Config {
    uint8_t palette = 1;
    uint8_t start = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// The compiler does not know that tile instructions read memory: without this it may leave out what
// was written for them.
void written() {
    asm volatile("" ::: "memory");
}

// Of so many activations in the first tile and in the second one, and so many elements of depth.
void configure(int64_t first, int64_t second, int64_t depth = kTileDepth) {
    Config config;
    const auto set = [&](int tile, int64_t columns, int64_t rows = kTileRows) {
        config.row_bytes[tile] = static_cast<uint16_t>(4 * columns);
        config.rows[tile] = static_cast<uint8_t>(rows);
    };
    for (int half = 0; half < 2; ++half) {
        const int64_t columns = std::max<int64_t>(1, half == 0 ? first : second);
        set(kSums + half, columns);
        set(kSums + 2 + half, columns);
        set(kRows + half, columns, depth / 2);
        set(kWeights + half, depth / 2);
    }
    written();
    _tile_loadconfig(&config);
}

// 16 lines of 16 words of 32 bits, turned.
void transpose(Lines& lines) {
    Lines turned;
    for (int i = 0; i < 16; i += 2) {
        turned[i] = _mm512_unpacklo_epi32(lines[i], lines[i + 1]);
        turned[i + 1] = _mm512_unpackhi_epi32(lines[i], lines[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        lines[i] = _mm512_unpacklo_epi64(turned[i], turned[i + 2]);
        lines[i + 1] = _mm512_unpackhi_epi64(turned[i], turned[i + 2]);
        lines[i + 2] = _mm512_unpacklo_epi64(turned[i + 1], turned[i + 3]);
        lines[i + 3] = _mm512_unpackhi_epi64(turned[i + 1], turned[i + 3]);
    }
    // Blocks of 4 x 4 words are turned; now the blocks change places.
    for (int i = 0; i < 4; ++i) {
        const __m512i a = _mm512_shuffle_i32x4(lines[i], lines[i + 4], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(lines[i], lines[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(lines[i + 8], lines[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(lines[i + 8], lines[i + 12], 0xdd);
        turned[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        turned[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        turned[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        turned[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    std::memcpy(static_cast<void*>(&lines), &turned, sizeof lines);
}

// Writes tile `sums` of outputs by activations as y of activations by outputs.
void write(const float* sums, int64_t columns, int64_t outputs, float* y, int64_t y_stride) {
    Lines lines;
    for (int i = 0; i < kTileRows; ++i) lines[i] = _mm512_load_si512(sums + i * kTileRows);
    transpose(lines);
    const auto mask = static_cast<__mmask16>((1u << std::min(outputs, kTileRows)) - 1u);
    for (int64_t r = 0; r < columns; ++r) {
        _mm512_mask_storeu_epi32(y + r * y_stride, mask, lines[r]);
    }
}

}  // namespace
}  // namespace moeinf
