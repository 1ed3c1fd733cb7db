#include "transfer/transpose.h"

#include <algorithm>
#include <cstring>

namespace moeinf {
namespace {

// A tile of the matrix as it is read: one cache line of each row, and the rows that a chunk may
// have. It stays in the L1 cache, and long runs are written.
constexpr uint64_t kTileRows = 128;
constexpr uint64_t kTileRowBytes = 64;

// A run of a matrix as it is read: its elements from number `first` on, `count` of them.
struct Run {
    const std::byte* bytes;
    uint64_t first;
    uint64_t count;
};

// The elements of some columns of some rows, all of them in the run.
template <class Element>
void turn_block(const Run& run, const Transpose& matrix, uint64_t first_row, uint64_t end_row,
                uint64_t first_col, uint64_t end_col, std::byte* out) {
    constexpr uint64_t kTileCols = kTileRowBytes / sizeof(Element);
    for (uint64_t col = first_col; col < end_col; col += kTileCols) {
        const uint64_t tile_end = std::min(end_col, col + kTileCols);
        for (uint64_t top = first_row; top < end_row; top += kTileRows) {
            const uint64_t bottom = std::min(end_row, top + kTileRows);
            for (uint64_t c = col; c < tile_end; ++c) {
                auto* to = reinterpret_cast<Element*>(out) + c * matrix.rows;
                for (uint64_t r = top; r < bottom; ++r) {
                    const uint64_t number = r * matrix.cols + c - run.first;
                    std::memcpy(to + r, run.bytes + number * sizeof(Element), sizeof(Element));
                }
            }
        }
    }
}

// A run may begin and end within a row.
template <class Element>
void turn_run(const Run& run, const Transpose& matrix, std::byte* out) {
    const uint64_t cols = matrix.cols;
    const auto block = [&](uint64_t row, uint64_t last_row, uint64_t first, uint64_t last) {
        turn_block<Element>(run, matrix, row, last_row, first, last, out);
    };
    const uint64_t end = run.first + run.count;
    uint64_t row = run.first / cols;
    const uint64_t last_row = end / cols;
    if (row == last_row) return block(row, row + 1, run.first % cols, end % cols);
    if (run.first % cols != 0) {
        block(row, row + 1, run.first % cols, cols);
        ++row;
    }
    block(row, last_row, 0, cols);
    block(last_row, last_row + 1, 0, end % cols);
}

// `begin` is where the bytes begin in the matrix.
void turn(std::span<const std::byte> bytes, uint64_t begin, const Transpose& matrix,
          std::byte* out) {
    const uint64_t size = matrix.element;
    // Of an element that is not here in full, each byte for itself.
    const auto turn_bytes = [&](uint64_t from, uint64_t to) {
        for (uint64_t i = from; i < to; ++i) {
            const uint64_t row = i / size / matrix.cols;
            const uint64_t col = i / size % matrix.cols;
            out[(col * matrix.rows + row) * size + i % size] = bytes[i - begin];
        }
    };
    const uint64_t end = begin + bytes.size();
    const uint64_t first = (begin + size - 1) / size;
    const uint64_t last = end / size;
    if (first > last) return turn_bytes(begin, end);
    turn_bytes(begin, first * size);
    turn_bytes(last * size, end);
    const Run run{bytes.data() + (first * size - begin), first, last - first};
    if (size == 1) turn_run<uint8_t>(run, matrix, out);
    if (size == 2) turn_run<uint16_t>(run, matrix, out);
    if (size == 4) turn_run<uint32_t>(run, matrix, out);
}

}  // namespace

void place(std::span<const std::byte> bytes, uint64_t slot_offset,
           std::span<const Transpose> transposes, std::byte* slot) {
    const auto take = [&](uint64_t end) {
        const size_t count = std::min<uint64_t>(bytes.size(), end - slot_offset);
        const auto taken = bytes.first(count);
        bytes = bytes.subspan(count);
        slot_offset += count;
        return taken;
    };
    const auto copy = [&](uint64_t end) {
        std::byte* const to = slot + slot_offset;
        const auto taken = take(end);
        if (!taken.empty()) std::memcpy(to, taken.data(), taken.size());
    };
    for (const Transpose& matrix : transposes) {
        const uint64_t end = matrix.slot_offset + matrix.nbytes();
        if (slot_offset < matrix.slot_offset) copy(matrix.slot_offset);
        if (bytes.empty()) return;
        if (slot_offset >= end) continue;
        const uint64_t begin = slot_offset - matrix.slot_offset;
        turn(take(end), begin, matrix, slot + matrix.slot_offset);
    }
    copy(slot_offset + bytes.size());
}

}  // namespace moeinf
