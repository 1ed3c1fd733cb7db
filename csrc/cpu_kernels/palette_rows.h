// The products of bf16 in 12 bits (formats/palette.h): some rows are written as bf16 into a buffer
// in the cache, and multiplied as bf16 is. So the results have the bits of the plain matrix.
// Written once over a `Floats` type and compiled for each instruction set (included only by
// kernels_*.cpp; unnamed for the reason float_math.h gives).
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu_kernels/dot_tile.h"
#include "cpu_kernels/formats/bf16.h"
#include "cpu_kernels/formats/palette.h"

namespace moeinf {
namespace {

constexpr int64_t kPaletteAhead = 8192;  // bytes from a block to those that are prefetched
// Rows begin a cache line apart from a multiple of 4096 bytes: they would share few places of a
// cache.
constexpr int64_t kRowGap = 32;

// Where the rows of a job lie, and how they end.
struct PaletteJob {
    const DotJob& job;
    int rare;
    int64_t blocks = job.depth / kPaletteCols;
    int64_t ahead = 0;  // bytes; 0: nothing is prefetched

    PaletteJob(const DotJob& of, int rare_weights) : job(of), rare(rare_weights) {
        if (!job.from_memory) return;
        // If rows of another matrix lie between, the distance is a number of whole rows.
        const int64_t row = blocks * kPaletteBytes + palette_tail(rare);
        ahead = job.w_stride < 2 * row ? kPaletteAhead : (kPaletteAhead / row + 1) * job.w_stride;
    }
};

// 64 columns. `to` may not overlap the block.
inline void expand_block(unsigned base, const std::byte* __restrict block, BF16* __restrict to) {
    const auto* codes = reinterpret_cast<const uint8_t*>(block);
    const auto* rest = codes + kPaletteCodes;
    const auto number = [&](uint16_t code, uint16_t byte) {
        const auto exponent = static_cast<uint16_t>(code == kPaletteZero ? 0 : (base + code) & 255);
        return static_cast<uint16_t>((byte & 128) << 8 | exponent << 7 | (byte & 127));
    };
    for (int i = 0; i < kPaletteCodes; ++i) to[i].bits = number(codes[i] & 15, rest[i]);
    for (int i = 0; i < kPaletteCodes; ++i) {
        to[kPaletteCodes + i].bits = number(codes[i] >> 4, rest[kPaletteCodes + i]);
    }
}

// Row n as bf16. Writes nothing outside of it, whatever its bytes are.
template <class F>
inline void expand_row(const PaletteJob& rows, int64_t n, BF16* to) {
    const std::byte* block = rows.job.w + n * rows.job.w_stride;
    const std::byte* tail = block + rows.blocks * kPaletteBytes;
    const auto base = std::to_integer<unsigned>(tail[0]);
    const auto expand = [&](const auto& one) {
        BF16* out = to;
        for (int64_t b = 0; b < rows.blocks; ++b, block += kPaletteBytes, out += kPaletteCols) {
            if (rows.ahead != 0) {
                __builtin_prefetch(block + rows.ahead, 0, 2);
                __builtin_prefetch(block + rows.ahead + kLine, 0, 2);
            }
            one(block, out);
        }
    };
    if constexpr (requires { F::exponents(base); }) {
        const auto exponents = F::exponents(base);
        expand([&](const std::byte* from, BF16* out) { F::expand(exponents, from, out); });
    } else {
        expand([&](const std::byte* from, BF16* out) { expand_block(base, from, out); });
    }
    for (int i = 0; i < rows.rare; ++i) {
        uint32_t entry;
        std::memcpy(&entry, tail + 4 + 4 * i, sizeof entry);
        if (entry == 0) break;
        if (entry >> 16 < rows.job.depth) to[entry >> 16].bits = static_cast<uint16_t>(entry);
    }
}

// P: the product of plain bf16.
template <class F, class P>
[[gnu::noinline]] void dot_palette(const PaletteJob& rows) {
    constexpr int64_t kBuffer = kMostPaletteCols + kRowGap;
    alignas(64) BF16 buffer[kBuffer];
    const DotJob& job = rows.job;
    const int64_t stride = job.depth + kRowGap;
    int64_t n = 0;
    for (; n + P::kOutputs <= job.outputs && P::kOutputs * stride <= kBuffer; n += P::kOutputs) {
        for (int i = 0; i < P::kOutputs; ++i) expand_row<F>(rows, n + i, buffer + i * stride);
        panel_tiles<P, P::kOutputs, 0>(job, buffer, stride, job.y + n, nullptr);
    }
    for (; n < job.outputs; ++n) {
        expand_row<F>(rows, n, buffer);
        panel_tiles<P, 1, 0>(job, buffer, stride, job.y + n, nullptr);
    }
}

template <class F, class P, class Decoder>
void palette_product(const DotJob& job) {
    dot_palette<F, P>({job, Decoder::kRare});
}

// On a matrix unit, whose product of bf16 is `tiles`.
template <class F, void (*tiles)(const DotJob&), class Decoder>
void palette_tiles(const DotJob& job) {
    constexpr int64_t kOutputs = 2 * kTileRows;
    constexpr int64_t kBuffer = kOutputs * (4096 + kRowGap);
    static_assert(kBuffer >= kMostPaletteCols + kRowGap);
    alignas(64) BF16 buffer[kBuffer];
    const PaletteJob rows(job, Decoder::kRare);
    const int64_t stride = job.depth + kRowGap;
    const int64_t most = std::min(kOutputs, kBuffer / stride);
    DotJob part = job;
    part.w = reinterpret_cast<const std::byte*>(buffer);
    part.w_stride = stride * static_cast<int64_t>(sizeof(BF16));
    part.from_memory = false;
    for (int64_t n = 0; n < job.outputs; n += part.outputs, part.y += part.outputs) {
        part.outputs = std::min(most, job.outputs - n);
        for (int64_t i = 0; i < part.outputs; ++i) {
            expand_row<F>(rows, n + i, buffer + i * stride);
        }
        tiles(part);
    }
}

}  // namespace
}  // namespace moeinf
