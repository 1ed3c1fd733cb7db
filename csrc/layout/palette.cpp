#include "layout/palette.h"

#include <cstring>

namespace moeinf {

const char* palette_fault(const std::byte* row, int64_t cols, int64_t tail) {
    constexpr unsigned kMostBase = 255 - (kPaletteZero - 1);
    const std::byte* end = row + cols / kPaletteCols * kPaletteBytes;
    if (std::to_integer<unsigned>(end[0]) > kMostBase) return "a base exponent of at most 241";
    constexpr std::byte kZeros[3] = {};
    if (std::memcmp(end + 1, kZeros, sizeof kZeros) != 0) {
        return "three bytes of 0 after the base exponent";
    }
    int64_t before = -1;
    bool ended = false;
    for (int64_t at = 4; at < tail; at += 4) {
        uint32_t entry;
        std::memcpy(&entry, end + at, sizeof entry);
        if (entry == 0) {
            ended = true;
            continue;
        }
        const auto column = static_cast<int64_t>(entry >> 16);
        if (column >= cols) return "rare weights in columns of the matrix";
        if (ended || column <= before) return "rare weights in rising columns";
        before = column;
        const std::byte* block = row + column / kPaletteCols * kPaletteBytes;
        const int64_t i = column % kPaletteCols;
        const auto codes = std::to_integer<unsigned>(block[i % kPaletteCodes]);
        const unsigned code = i < kPaletteCodes ? codes & 15 : codes >> 4;
        if (code != kPaletteZero || block[kPaletteCodes + i] != std::byte{0}) {
            return "a zero in the place of each rare weight";
        }
    }
    return nullptr;
}

}  // namespace moeinf
