// bf16 in about 12 bits, without loss: the exponents of a row as codes of 4 bits. The bytes are
// those of moeinf/checkpoint/palette.py: blocks of 64 columns, then a tail. A block is 32 bytes of
// codes, of two columns each, and 64 bytes of signs and fractions. The tail is the base exponent,
// three bytes of 0, and the rare weights, whose exponents have no code.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moeinf {

constexpr int64_t kPaletteCols = 64;                    // of a block
constexpr int64_t kPaletteCodes = 32;                   // bytes of codes of a block
constexpr int64_t kPaletteBytes = 96;                   // of a block
constexpr int64_t kMostPaletteCols = int64_t{1} << 16;  // that the tail can name
constexpr unsigned kPaletteZero = 15;  // the code of exponent 0; the others add 0 to 14 to the base

[[nodiscard]] constexpr int64_t palette_tail(int64_t rare) {
    return 4 + 4 * rare;
}

// What a row with such a tail should have and has not; null for a good one.
[[nodiscard]] const char* palette_fault(const std::byte* row, int64_t cols, int64_t tail);

}  // namespace moeinf
