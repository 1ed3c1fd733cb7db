// One matrix of an expert, as bytes of a slot. Data only: the layout of a checkpoint fills it in,
// and the CPU engine reads it. Gate and up may lie one after the other, or with alternating rows.
// Such experts differ only in offsets and strides.
#pragma once

#include <cstdint>
#include <optional>

#include "base/dtype.h"

namespace moeinf {

// How weights are stored: a row of the table in compute/formats/decoders.h.
enum class WeightFormat : int32_t {};

// Rows at equal distances; a bias has one element in each row.
struct Rows {
    uint64_t offset = 0;  // of row 0, in bytes from the start of the slot
    int64_t stride = 0;   // bytes from one row to the next
};

struct Matrix {
    WeightFormat format{};
    int64_t rows = 0;  // outputs
    int64_t cols = 0;  // inputs
    Rows values;
    std::optional<Rows> scales = std::nullopt;
    std::optional<Rows> bias = std::nullopt;
    DType bias_dtype = DType::kF32;
};

}  // namespace moeinf
