#include "transfer/transpose.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace moeinf {
namespace {

// A tile of both matrices stays in the L1 cache.
constexpr uint64_t kTile = 32;

template <class Element>
void turn(const std::byte* from, std::byte* to, uint64_t rows, uint64_t cols) {
    const auto* in = reinterpret_cast<const Element*>(from);
    auto* out = reinterpret_cast<Element*>(to);
    for (uint64_t row = 0; row < rows; row += kTile) {
        const uint64_t last_row = std::min(rows, row + kTile);
        for (uint64_t col = 0; col < cols; col += kTile) {
            const uint64_t last_col = std::min(cols, col + kTile);
            for (uint64_t c = col; c < last_col; ++c) {
                for (uint64_t r = row; r < last_row; ++r) out[c * rows + r] = in[r * cols + c];
            }
        }
    }
}

}  // namespace

void apply(std::span<const Transpose> transposes, std::byte* slot,
           std::vector<std::byte>& scratch) {
    for (const Transpose& one : transposes) {
        std::byte* const matrix = slot + one.slot_offset;
        scratch.resize(std::max<size_t>(scratch.size(), one.nbytes()));
        std::memcpy(scratch.data(), matrix, one.nbytes());
        if (one.element == 1) turn<uint8_t>(scratch.data(), matrix, one.rows, one.cols);
        if (one.element == 2) turn<uint16_t>(scratch.data(), matrix, one.rows, one.cols);
        if (one.element == 4) turn<uint32_t>(scratch.data(), matrix, one.rows, one.cols);
    }
}

}  // namespace moeinf
