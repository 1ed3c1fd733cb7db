// The product of one matrix with activations, as the expert FFN and the linear layers both use it:
// which kernel of an instruction set, from which bytes, and the bias. Private to this room.
#pragma once

#include <string>

#include "cpu_kernels/kernels.h"
#include "layout/matrix.h"

namespace moeinf {

// The kernel that multiplies `matrix` by activations of this type (bf16 or f32). Its `dot` is null
// if the set must widen bf16 activations first.
[[nodiscard]] const Product& product_of(const KernelSet& kernels, const Matrix& matrix,
                                        DType dtype);

// Throws Error(kInvalid) for a matrix that no kernel can multiply; `name` begins the message.
void check_matrix(const Matrix& matrix, const std::string& name);

// Bytes of a row of values.
[[nodiscard]] int64_t row_bytes(const Matrix& matrix);

// Bytes of a row of activations as the product takes it.
[[nodiscard]] size_t activation_row_bytes(const Product& product, size_t cols, DType dtype);

// The part of a job that says where the rows of `matrix` lie, from row `first` on.
void place(const Matrix& matrix, DotJob& job, const std::byte* base, int64_t first) noexcept;

// One product of the rows of `matrix` from row `first` on, and its bias. The offsets of the matrix
// count from `base`. The caller sets x, rows, outputs, depth, y, y_stride and from_memory.
void multiply(const KernelSet& kernels, const Matrix& matrix, void (*dot)(const DotJob&),
              DotJob& job, const std::byte* base, int64_t first) noexcept;

// y[r][n] += bias of output job.first + n.
void add_bias(const KernelSet& kernels, const std::byte* bias, int64_t stride, DType dtype,
              const DotJob& job) noexcept;

}  // namespace moeinf
