// The instruction sets of the expert FFN as data: a table of named sets of functions, best first.
// The CPU engine takes one set and calls only its functions. Results may differ between sets.
// Within one set they never depend on how work is divided, because every output is a dot product
// that is summed in one fixed order, for any number of activations. Calls of many tokens may have
// another order than calls of few (FormatKernels::tiles).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "base/dtype.h"
#include "cpu_kernels/gate.h"
#include "layout/matrix.h"

namespace moeinf {

constexpr int64_t kMaxScales = 2048;  // in a row of scales
constexpr int kScaleOutputs = 8;      // rows of weights of a tile, at most

// y[r * y_stride + n] = sum over k of x[r][k] * w[n][k], for r < rows and n < outputs. Rows of w
// hold `depth` elements in one weight format; nothing outside them is read.
struct DotJob {
    const void* const* x = nullptr;  // one pointer for each row, to `depth` elements
    int64_t rows = 0;
    const std::byte* w = nullptr;
    int64_t w_stride = 0;               // bytes
    int64_t first = 0;                  // the row of the matrix that w begins at
    const Scales* how = nullptr;        // null: no scales
    const std::byte* scales = nullptr;  // of row 0 of the matrix
    const std::byte* zeros = nullptr;   // the same, if there are any
    float multiplier = 1;
    int64_t outputs = 0;
    int64_t depth = 0;
    float* y = nullptr;
    int64_t y_stride = 0;      // in floats
    bool from_memory = false;  // w lies in memory, so prefetching helps; else it lies in a cache
};

// out[i] = value of the gate function at gate[i] and up[i]; up is null where there is none.
struct GateJob {
    const float* gate;
    const float* up;
    int64_t count;
    void* out;
    const Gate& constants;
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

// The product of one weight format with activations of one type. `arrange` writes `count` elements
// in the order that the product wants, and zeros up to a multiple of `step`; null where the product
// takes them as they are. With `sums`, a row of floats follows: the sum of each `sums` elements.
struct Product {
    void (*dot)(const DotJob& job) = nullptr;
    void (*arrange)(const void* from, int64_t count, void* to) = nullptr;
    int64_t step = 1;
    int64_t sums = 0;
    int64_t step_bytes = 0;  // of an arranged step; 0: elements of their own type
};

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileDepth = 32;

// Bytes of each activation as KernelSet::arrange_tiles writes it.
constexpr int64_t tile_row_bytes(int64_t depth) {
    const int64_t tiles = (depth + kTileDepth - 1) / kTileDepth;
    const int64_t bytes = tiles * (kTileDepth * 2 + static_cast<int64_t>(sizeof(float)));
    return (bytes + 63) / 64 * 64;
}

// `bf16` multiplies bf16 activations without widening them and without loss. Its functions are null
// if the set must widen activations first. `tiles` does it on a matrix unit, for scales of all
// columns, of 16, or of a multiple of kTileDepth. It takes activations as KernelSet::arrange_tiles
// writes them: x[i] of a job is the place of activations 16 i to 16 i + 15. It may read kTileBehind
// bytes behind the last ones. Null where the set has none, for weights that are not exact in bf16,
// and for minima of 16 columns. `decode` writes the weights of a job as numbers, row after row; it
// reads neither its activations nor its y.
constexpr int64_t kTileBehind = 64;
struct FormatKernels {
    Product f32;
    Product bf16;
    void (*tiles)(const DotJob& job) = nullptr;
    void (*decode)(const DotJob& job, void* out, DType dtype) = nullptr;
};

// One gate function with one activation. to_bf16 is null in sets without bf16 products.
struct GateKernels {
    void (*to_f32)(const GateJob& job);
    void (*to_bf16)(const GateJob& job);
};

struct KernelSet {
    std::string_view name;
    bool (*supported)();  // by this CPU and its operating system

    const FormatKernels* formats;  // indexed by WeightFormat
    const GateKernels* gates;      // indexed by Gate::kernel

    // Writes up to 16 rows of bf16, with as many elements for each as the depth, rounded up to
    // kTileDepth; and behind all of them, the sum of each kTileDepth elements of each. Null in a
    // set without a matrix unit.
    void (*arrange_tiles)(const void* const* rows, int64_t count, int64_t depth, void* to);

    void (*widen)(const void* from, DType dtype, int64_t count, float* to);

    void (*combine)(const CombineJob& job);
};

// Every set this build holds, best first. The last one runs everywhere.
[[nodiscard]] std::span<const KernelSet* const> kernel_sets();

// The best supported set, or the one of that name; Error(kInvalid) for an unknown name,
// Error(kUnsupported) for one this CPU cannot run. Both messages list what there is.
[[nodiscard]] const KernelSet& select_kernels(std::string_view name = {});

}  // namespace moeinf
