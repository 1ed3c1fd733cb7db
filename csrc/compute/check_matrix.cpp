// The checks of a matrix. They run once, when an expert or a linear layer is described.
#include <string>

#include "base/error.h"
#include "compute/matrix_product.h"
#include "cpu_kernels/formats/formats.h"

namespace moeinf {
namespace {

[[noreturn]] void invalid(const std::string& message) {
    throw Error(ErrorCode::kInvalid, message);
}

std::string number(int64_t value) {
    return std::to_string(value);
}

// Rows of `row_bytes` bytes, whose elements are `unit` bytes each.
void check_rows(const Rows& rows, int64_t row_bytes, int64_t unit, const std::string& name) {
    if (rows.offset % static_cast<uint64_t>(unit) != 0 || rows.stride % unit != 0) {
        invalid(name + ": offsets and strides must be multiples of " + number(unit) +
                " bytes, got " + std::to_string(rows.offset) + " and " + number(rows.stride));
    }
    if (rows.stride < row_bytes) {
        invalid(name + ": a row has " + number(row_bytes) + " bytes, the next begins after " +
                number(rows.stride));
    }
}

// A product takes whole groups or whole parts of a group at a time.
void check_scales(const Scales& scales, int64_t cols, const FormatFacts& format,
                  const std::string& name) {
    const int64_t block = scales.block_cols;
    if (scales.block_rows < 1 || block < 0 ||
        (block != 0 && (block < 8 || (128 % block != 0 && block % 128 != 0)))) {
        invalid(name +
                ": expected blocks of 1 row or more, and of all columns, of 8, 16, 32, 64 "
                "or of a multiple of 128, got " +
                number(scales.block_rows) + " x " + number(block));
    }
    if (scales.count(cols) > kMaxScales) {
        invalid(name + ": expected at most " + number(kMaxScales) + " in a row, got " +
                number(scales.count(cols)));
    }
    const int64_t unit = scale_bytes(scales.type);
    check_rows(scales.rows, scales.count(cols) * unit, unit, name);
    if (!scales.zeros) return;
    if (!format.zeros) invalid(name + ": " + std::string(format.name) + " has no zero points");
    check_rows(*scales.zeros, scales.count(cols), 1, name + " zero points");
}

}  // namespace

void check_matrix(const Matrix& matrix, const std::string& name) {
    const FormatFacts& format = facts(matrix.format);
    const int64_t cols = matrix.cols;
    if (matrix.rows < 0 || cols < 1) {
        invalid(name + ": no matrix has " + number(matrix.rows) + " x " + number(cols) +
                " elements");
    }
    if (cols % format.pack != 0) {
        invalid(name + ": a row of " + std::string(format.name) + " needs a multiple of " +
                number(format.pack) + " columns, got " + number(cols));
    }
    if (format.most_cols != 0 && cols > format.most_cols) {
        invalid(name + ": a row of " + std::string(format.name) + " has at most " +
                number(format.most_cols) + " columns, got " + number(cols));
    }
    check_rows(matrix.values, format.row_bytes(cols), format.alignment, name);
    if (format.group != 0 && cols / format.group > kMaxScales) {
        invalid(name + ": expected at most " + number(kMaxScales * format.group) +
                " columns, got " + number(cols));
    }
    if (!format.scaled && (matrix.scales || matrix.multiplier)) {
        invalid(name + ": " + std::string(format.name) + " has no scales, got some");
    }
    if (matrix.scales) check_scales(*matrix.scales, cols, format, name + " scales");
    if (matrix.multiplier && *matrix.multiplier % sizeof(float) != 0) {
        invalid(name + " multiplier: its offset must be a multiple of 4 bytes, got " +
                std::to_string(*matrix.multiplier));
    }
    if (matrix.bias) {
        const auto unit = static_cast<int64_t>(dtype_bytes(matrix.bias_dtype));
        check_rows(*matrix.bias, unit, unit, name + " bias");
    }
}

}  // namespace moeinf
