// One matrix of an expert, as bytes of a slot. Data only: the layout of a checkpoint fills it in,
// and the CPU engine reads it. Gate and up may lie one after the other, or with alternating rows.
// Such experts differ only in offsets and strides.
#pragma once

#include <cstdint>
#include <optional>

#include "base/dtype.h"

namespace moeinf {

// How weights are stored: a row of the table in cpu_kernels/formats/decoders.h.
enum class WeightFormat : int32_t {};

enum class ScaleType : int32_t { kF32, kBF16, kF16, kE8M0, kE4M3 };

[[nodiscard]] constexpr int64_t scale_bytes(ScaleType type) {
    switch (type) {
        case ScaleType::kF32:
            return 4;
        case ScaleType::kBF16:
        case ScaleType::kF16:
            return 2;
        case ScaleType::kE8M0:
        case ScaleType::kE4M3:
            return 1;
    }
    __builtin_unreachable();
}

// Rows at equal distances; a bias has one element in each row.
struct Rows {
    uint64_t offset = 0;  // of row 0, in bytes from the start of the slot
    int64_t stride = 0;   // bytes from one row to the next
};

// One number for each block of a matrix, by which its elements are multiplied. Blocks at the edges
// may be smaller. A row of scales belongs to `block_rows` rows of the matrix. `zeros`: integers of
// 8 bits, one beside each scale, that are subtracted from the stored integers before.
struct Scales {
    Rows rows;
    ScaleType type = ScaleType::kF32;
    int64_t block_rows = 1;
    int64_t block_cols = 0;  // 0: all columns
    std::optional<Rows> zeros = std::nullopt;

    // In a row of scales, for a matrix of `cols` columns.
    [[nodiscard]] constexpr int64_t count(int64_t cols) const {
        return block_cols == 0 ? 1 : (cols + block_cols - 1) / block_cols;
    }
};

struct Matrix {
    WeightFormat format{};
    int64_t rows = 0;  // outputs
    int64_t cols = 0;  // inputs
    Rows values;
    std::optional<Scales> scales = std::nullopt;
    std::optional<Rows> bias = std::nullopt;
    DType bias_dtype = DType::kF32;
    // Of a 32-bit float that multiplies the whole matrix, in bytes from the start of the slot.
    std::optional<uint64_t> multiplier = std::nullopt;
};

}  // namespace moeinf
