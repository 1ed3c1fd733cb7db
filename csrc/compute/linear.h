// Linear layers for a few tokens, with the kernels and the threads of the experts, for W in any
// weight format:
//
//   out[t] = W x[t] + bias
//
// Its limit is the time to read W once, so the rows of W are read in long blocks, which the threads
// share. Every output is one dot product in 32-bit floats, summed in one fixed order. So the result
// has the same bits for every number of threads and of tokens in a call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "compute/cpu_engine.h"
#include "layout/matrix.h"

namespace moeinf {

// Beyond, the product is bound by arithmetic, and other libraries pack W for it. `decode` makes
// numbers of it for them.
constexpr int64_t kLinearTokens = 16;

// W, checked once. Throws Error(kInvalid) for a matrix that the kernels cannot multiply.
struct LinearWeight {
    explicit LinearWeight(const Matrix& matrix);
    Matrix matrix;
};

struct LinearCall {
    const void* x = nullptr;  // [tokens, cols], elements of a row beside each other
    DType x_dtype = DType::kF32;
    int64_t x_stride = 0;  // elements from one token to the next
    int64_t tokens = 0;
};

// One of the layers that take the same tokens.
struct LinearPart {
    Matrix weight;  // its offsets count from `base`
    const std::byte* base = nullptr;
    const std::byte* bias = nullptr;  // [rows], contiguous; null: the matrix's own, or none
    DType bias_dtype = DType::kF32;
    void* out = nullptr;  // [tokens, rows], contiguous, of the type of x
};

// All of them in one job of the threads: small ones do not wait for each other. Throws
// Error(kInvalid) for more than kLinearTokens tokens, more than kLinearParts layers, and sizes that
// make no sense.
constexpr size_t kLinearParts = 3;
void linear(CpuEngine& engine, const LinearCall& call, std::span<const LinearPart> parts);

// Writes `count` rows of W from row `first` on, [count, cols] of `dtype`, at `out`.
void decode(CpuEngine& engine, const Matrix& weight, const std::byte* base, int64_t first,
            int64_t count, void* out, DType dtype);

}  // namespace moeinf
