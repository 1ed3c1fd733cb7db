// The checks of an expert's matrices. They run once, when the expert is described.
#include <string>

#include "base/error.h"
#include "compute/expert_ffn.h"
#include "compute/matrix_product.h"

namespace moeinf {
namespace {

[[noreturn]] void invalid(const std::string& message) {
    throw Error(ErrorCode::kInvalid, "expert FFN: " + message);
}

std::string number(int64_t value) {
    return std::to_string(value);
}

void check(const Matrix& matrix, int64_t rows, int64_t cols, const std::string& name) {
    if (matrix.rows != rows || matrix.cols != cols) {
        invalid(name + ": expected " + number(rows) + " x " + number(cols) + " to go with gate, " +
                "got " + number(matrix.rows) + " x " + number(matrix.cols));
    }
    check_matrix(matrix, "expert FFN: " + name);
}

}  // namespace

ExpertFfn::ExpertFfn(Matrix gate_matrix, std::optional<Matrix> up_matrix, Matrix down_matrix,
                     Gate gate_function)
    : gate(gate_matrix), up(up_matrix), down(down_matrix), function(gate_function) {
    if (gate.rows <= 0 || gate.cols <= 0) {
        invalid("hidden and intermediate sizes must be positive, got " + number(gate.cols) +
                " and " + number(gate.rows));
    }
    if (up.has_value() != function.has_up) {
        invalid(function.has_up ? "the gate function needs up, and there is none"
                                : "the gate function has no up, and there is one");
    }
    check(gate, gate.rows, gate.cols, "gate");
    if (up) check(*up, gate.rows, gate.cols, "up");
    check(down, gate.cols, gate.rows, "down");
    const bool biased = gate.bias.has_value();
    if (down.bias.has_value() != biased || (up && up->bias.has_value() != biased)) {
        invalid("every matrix has a bias or none has one; missing from" +
                std::string(biased ? "" : " gate") + (up && !up->bias ? " up" : "") +
                (down.bias ? "" : " down"));
    }
}

}  // namespace moeinf
