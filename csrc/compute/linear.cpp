#include "compute/linear.h"

#include <algorithm>
#include <string>

#include "base/error.h"
#include "base/ranges.h"
#include "base/sizes.h"
#include "compute/matrix_product.h"

namespace moeinf {
namespace {

// A task takes whole units of rows: a multiple of every tile's width.
constexpr int64_t kUnitRows = 12;
// The most bytes of weights of a task. Long reads are the fastest; see expert_ffn.cpp.
constexpr int64_t kTaskBytes = 768 << 10;
// The most bytes of numbers of a task that decodes: they stay in the L2 cache.
constexpr int64_t kDecodedBytes = 192 << 10;
// Results of a task, on its stack until they are rounded.
constexpr int64_t kTaskValues = 3072;
// Tasks of a call for each thread, so that no thread waits long for the last one.
constexpr int64_t kTasksPerThread = 8;
constexpr size_t kAlign = 64;

[[noreturn]] void invalid(const std::string& message) {
    throw Error(ErrorCode::kInvalid, "linear: " + message);
}

void check(const Matrix& weight, const LinearCall& call) {
    if (call.tokens < 0 || call.tokens > kLinearTokens) {
        invalid("expected 0 to " + std::to_string(kLinearTokens) + " tokens, got " +
                std::to_string(call.tokens));
    }
    if (weight.rows < 0 || weight.cols < 1 || weight.values.stride < row_bytes(weight) ||
        call.x_stride < 0) {
        invalid("a matrix of " + std::to_string(weight.rows) + " x " + std::to_string(weight.cols) +
                " in rows of " + std::to_string(weight.values.stride) +
                " bytes, and tokens that are " + std::to_string(call.x_stride) +
                " elements apart, are none that it can multiply");
    }
}

int64_t rows_of_task(const Matrix& weight, int64_t tokens, int64_t threads) {
    const int64_t share = weight.rows / (kTasksPerThread * threads);
    const int64_t most = std::min(kTaskBytes / row_bytes(weight), kTaskValues / tokens);
    return std::max<int64_t>(1, std::min(share, most) / kUnitRows) * kUnitRows;
}

}  // namespace

LinearWeight::LinearWeight(const Matrix& weight) : matrix(weight) {
    check_matrix(weight, "linear: weight");
}

void linear(CpuEngine& engine, const Matrix& weight, const std::byte* base,
            const LinearCall& call) {
    check(weight, call);
    if (call.tokens == 0 || weight.rows == 0) return;
    const Range range("moeinf linear");
    const KernelSet& kernels = engine.kernels();
    const bool as_it_is =
        call.x_dtype == DType::kBF16 && product_of(kernels, weight, DType::kBF16).dot != nullptr;
    const DType dtype = as_it_is ? DType::kBF16 : DType::kF32;
    const Product& product = product_of(kernels, weight, dtype);

    // The activations as the product takes them: widened, then arranged, where it needs that.
    const size_t unit = dtype_bytes(call.x_dtype);
    const auto cols = static_cast<size_t>(weight.cols);
    const size_t wide = call.x_dtype == dtype ? 0 : round_up(cols * sizeof(float), kAlign);
    const size_t arranged = product.arrange == nullptr
                                ? 0
                                : round_up(activation_row_bytes(product, cols, dtype), kAlign);
    ScratchBuffer scratch;
    const size_t row = arranged != 0 ? arranged : wide;
    if (row != 0) {
        scratch = engine.take_scratch(static_cast<size_t>(call.tokens) * row + wide);
    }
    const void* x[kLinearTokens];
    for (int64_t t = 0; t < call.tokens; ++t) {
        const void* from =
            static_cast<const std::byte*>(call.x) + static_cast<size_t>(t * call.x_stride) * unit;
        std::byte* to = scratch.data() + static_cast<size_t>(t) * row;
        if (wide != 0) {
            auto* floats = reinterpret_cast<float*>(
                arranged == 0 ? to : scratch.data() + static_cast<size_t>(call.tokens) * row);
            kernels.widen(from, call.x_dtype, weight.cols, floats);
            from = floats;
        }
        if (arranged != 0) {
            product.arrange(from, weight.cols, to);
            from = to;
        }
        x[t] = from;
    }

    const size_t out_unit = dtype_bytes(call.x_dtype);
    const bool in_place = call.x_dtype == DType::kF32;
    const int64_t step = rows_of_task(weight, call.tokens, engine.pool().threads());
    engine.pool().run((weight.rows + step - 1) / step, [&](int64_t task) noexcept {
        const int64_t first = task * step;
        const int64_t count = std::min(step, weight.rows - first);
        float values[kTaskValues];
        DotJob job{.x = x,
                   .rows = call.tokens,
                   .outputs = count,
                   .depth = weight.cols,
                   .y = in_place ? static_cast<float*>(call.out) + first : values,
                   .y_stride = in_place ? weight.rows : count,
                   .from_memory = true};
        multiply(kernels, weight, product.dot, job, base, first);
        if (call.bias != nullptr) {
            add_bias(kernels, call.bias, static_cast<int64_t>(dtype_bytes(call.bias_dtype)),
                     call.bias_dtype, job);
        }
        if (in_place) return;
        const float one = 1;
        for (int64_t t = 0; t < call.tokens; ++t) {
            const float* y = values + t * count;
            auto* out = static_cast<std::byte*>(call.out) +
                        static_cast<size_t>(t * weight.rows + first) * out_unit;
            kernels.combine({&y, &one, 1, count, out, call.x_dtype});
        }
    });
    if (row != 0) engine.give_scratch(std::move(scratch));
}

void decode(CpuEngine& engine, const Matrix& weight, const std::byte* base, int64_t first,
            int64_t count, void* out, DType dtype) {
    if (first < 0 || count < 0 || count > weight.rows - first) {
        invalid("rows " + std::to_string(first) + " to " + std::to_string(first + count) + " of " +
                std::to_string(weight.rows));
    }
    const auto& kernels = engine.kernels().formats[static_cast<size_t>(weight.format)];
    const int64_t row = weight.cols * static_cast<int64_t>(dtype_bytes(dtype));
    const int64_t step = std::max<int64_t>(1, kDecodedBytes / row);
    engine.pool().run((count + step - 1) / step, [&](int64_t task) noexcept {
        DotJob job{.outputs = std::min(step, count - task * step), .depth = weight.cols};
        place(weight, job, base, first + task * step);
        kernels.decode(job, static_cast<std::byte*>(out) + task * step * row, dtype);
    });
}

}  // namespace moeinf
