// The instruction sets the expert FFN is written for, as data: a table of named sets of functions,
// best first. The CPU engine takes one set and calls only through it. Results may differ between
// sets; within one they never depend on how work is cut, for every output is a dot product summed
// in one fixed order, however many activations share the pass over the weights.
#pragma once

#include <span>
#include <string_view>

#include "compute/dtype.h"

namespace moeinf {

enum class Activation : int32_t { kSilu, kGelu, kGeluTanh, kRelu };

// y[r * y_stride + n] = sum over k of x[r][k] * w[n][k], for r < rows and n < outputs. Rows of w
// lie one after another, `depth` elements each; nothing outside them is read.
struct DotJob {
    const void* const* x;  // one pointer for each row, to `depth` elements
    int64_t rows;
    const void* w;
    int64_t outputs;
    int64_t depth;
    float* y;
    int64_t y_stride;  // in floats
    bool from_memory;  // where w is expected to lie: worth fetching ahead, or in a cache
};

// out[h] = sum over j of scale[j] * y[j][h], in order of j.
struct CombineJob {
    const float* const* y;
    const float* scale;
    int64_t terms;
    int64_t width;
    void* out;
    DType out_dtype;
};

struct KernelSet {
    std::string_view name;
    bool (*supported)();  // by this CPU and its operating system

    // The format in which the products want the activations: kF32 or, where the set multiplies
    // them directly and nothing is lost, kBF16.
    DType (*activation_dtype)(DType hidden, DType weights);

    void (*dot)(DType activations, DType weights, const DotJob& job);

    // out[i] = act(gate[i]) * up[i], or act(gate[i]) where up is null; out is kF32 or kBF16.
    void (*activate)(Activation act, const float* gate, const float* up, int64_t count, void* out,
                     DType out_dtype);

    void (*widen)(const void* from, DType dtype, int64_t count, float* to);

    void (*combine)(const CombineJob& job);
};

// Every set this build holds, best first. The last one runs everywhere.
[[nodiscard]] std::span<const KernelSet* const> kernel_sets();

// The best supported set, or the one of that name; Error(kInvalid) for an unknown name,
// Error(kUnsupported) for one this CPU cannot run. Both messages list what there is.
[[nodiscard]] const KernelSet& select_kernels(std::string_view name = {});

}  // namespace moeinf
