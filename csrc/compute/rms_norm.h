// Root mean square norms of rows, with the bits that torch's operators give one after another:
//
//   r      = 1 / sqrt(mean of x[i]^2 + epsilon)                   in 32-bit floats
//   out[i] = (offset + weight[i]) * x[i] * r                      rounded to the type of x
//
// The bits depend on the order of the sum, which is that of ATen's. Whoever replaces a norm of
// torch compares the bits of both first.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "compute/cpu_engine.h"

namespace moeinf {

struct RmsNorm {
    float epsilon;
    float offset;       // of the weight: 0 or 1
    bool rounds_first;  // x[i] * r is rounded to the type of x before it is scaled
};

struct NormCall {
    const void* x;   // [rows, cols], elements of a row beside each other
    int64_t stride;  // elements from one row to the next
    int64_t rows;
    int64_t cols;
    const void* weight;  // [cols]
    void* out;           // [rows, cols], contiguous; may be x, where that is contiguous too
    DType dtype;         // of all three: bf16 or f32
};

constexpr int64_t kNormColumns = 8192;  // of a row, at most

void rms_norm(CpuEngine& engine, const RmsNorm& norm, const NormCall& call);

// out[i] = one[i] + other[i], rounded to their type: bf16 or f32.
void add(const void* one, const void* other, int64_t count, DType dtype, void* out);

}  // namespace moeinf
