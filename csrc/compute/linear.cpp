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

void check(const LinearCall& call, std::span<const LinearPart> parts) {
    if (call.tokens < 0 || call.tokens > kLinearTokens || parts.size() > kLinearParts) {
        invalid("expected 0 to " + std::to_string(kLinearTokens) + " tokens, got " +
                std::to_string(call.tokens) + ", for " + std::to_string(parts.size()) + " layers");
    }
    for (const LinearPart& part : parts) {
        const Matrix& weight = part.weight;
        if (weight.rows < 0 || weight.cols < 1 || weight.values.stride < row_bytes(weight) ||
            weight.cols != parts[0].weight.cols || call.x_stride < 0) {
            invalid("a matrix of " + std::to_string(weight.rows) + " x " +
                    std::to_string(weight.cols) + " in rows of " +
                    std::to_string(weight.values.stride) + " bytes, and tokens that are " +
                    std::to_string(call.x_stride) +
                    " elements apart, are none that it can multiply");
        }
    }
}

// The tokens as a product takes them: widened, then arranged, where it needs that.
struct Tokens {
    void (*arrange)(const void* from, int64_t count, void* to) = nullptr;
    DType dtype = DType::kF32;
    size_t wide = 0;      // bytes of a widened row
    size_t arranged = 0;  // bytes of an arranged row
    const void* x[kLinearTokens] = {};

    Tokens() = default;
    Tokens(const KernelSet& kernels, const LinearCall& call, const Matrix& weight) {
        const bool as_it_is = call.x_dtype == DType::kBF16 &&
                              product_of(kernels, weight, DType::kBF16).dot != nullptr;
        dtype = as_it_is ? DType::kBF16 : DType::kF32;
        const Product& product = product_of(kernels, weight, dtype);
        arrange = product.arrange;
        const auto cols = static_cast<size_t>(weight.cols);
        wide = call.x_dtype == dtype ? 0 : round_up(cols * sizeof(float), kAlign);
        if (arrange != nullptr) {
            arranged = round_up(activation_row_bytes(product, cols, dtype), kAlign);
        }
    }

    [[nodiscard]] bool same_as(const Tokens& other) const noexcept {
        return arrange == other.arrange && dtype == other.dtype && arranged == other.arranged;
    }

    [[nodiscard]] size_t scratch_bytes(const LinearCall& call) const noexcept {
        const size_t row = arranged != 0 ? arranged : wide;
        return row == 0 ? 0 : static_cast<size_t>(call.tokens) * row + wide;
    }

    void make(const KernelSet& kernels, const LinearCall& call, int64_t cols, std::byte* scratch) {
        const size_t row = arranged != 0 ? arranged : wide;
        const size_t unit = dtype_bytes(call.x_dtype);
        for (int64_t t = 0; t < call.tokens; ++t) {
            const void* from = static_cast<const std::byte*>(call.x) +
                               static_cast<size_t>(t * call.x_stride) * unit;
            std::byte* to = scratch + static_cast<size_t>(t) * row;
            if (wide != 0) {
                auto* floats = reinterpret_cast<float*>(
                    arranged == 0 ? to : scratch + static_cast<size_t>(call.tokens) * row);
                kernels.widen(from, call.x_dtype, cols, floats);
                from = floats;
            }
            if (arranged != 0) {
                arrange(from, cols, to);
                from = to;
            }
            x[t] = from;
        }
    }
};

int64_t rows_of_task(const Matrix& weight, int64_t all_rows, int64_t tokens, int64_t threads) {
    const int64_t share = all_rows / (kTasksPerThread * threads);
    const int64_t most = std::min(kTaskBytes / row_bytes(weight), kTaskValues / tokens);
    return std::max<int64_t>(1, std::min(share, most) / kUnitRows) * kUnitRows;
}

void multiply_rows(const KernelSet& kernels, const LinearCall& call, const LinearPart& part,
                   const Tokens& tokens, int64_t first, int64_t count) noexcept {
    const Matrix& weight = part.weight;
    const bool in_place = call.x_dtype == DType::kF32;
    float values[kTaskValues];
    DotJob job{.x = tokens.x,
               .rows = call.tokens,
               .outputs = count,
               .depth = weight.cols,
               .y = in_place ? static_cast<float*>(part.out) + first : values,
               .y_stride = in_place ? weight.rows : count,
               .from_memory = true};
    multiply(kernels, weight, product_of(kernels, weight, tokens.dtype).dot, job, part.base, first);
    if (part.bias != nullptr) {
        add_bias(kernels, part.bias, static_cast<int64_t>(dtype_bytes(part.bias_dtype)),
                 part.bias_dtype, job);
    }
    if (in_place) return;
    const float one = 1;
    for (int64_t t = 0; t < call.tokens; ++t) {
        const float* y = values + t * count;
        auto* out = static_cast<std::byte*>(part.out) +
                    static_cast<size_t>(t * weight.rows + first) * dtype_bytes(call.x_dtype);
        kernels.combine({&y, &one, 1, count, out, call.x_dtype});
    }
}

}  // namespace

LinearWeight::LinearWeight(const Matrix& weight) : matrix(weight) {
    check_matrix(weight, "linear: weight");
}

void linear(CpuEngine& engine, const LinearCall& call, std::span<const LinearPart> parts) {
    check(call, parts);
    if (call.tokens == 0 || parts.empty()) return;
    const Range range("moeinf linear");
    const KernelSet& kernels = engine.kernels();

    Tokens ways[kLinearParts];  // those that differ
    size_t offsets[kLinearParts];
    const Tokens* tokens_of[kLinearParts];
    size_t count = 0;
    size_t scratch_bytes = 0;
    int64_t all_rows = 0;
    for (size_t p = 0; p < parts.size(); ++p) {
        const Tokens way(kernels, call, parts[p].weight);
        ways[count] = way;
        size_t found = 0;
        while (!ways[found].same_as(way)) ++found;
        if (found == count) {
            offsets[count++] = scratch_bytes;
            scratch_bytes += way.scratch_bytes(call);
        }
        tokens_of[p] = &ways[found];
        all_rows += parts[p].weight.rows;
    }
    ScratchBuffer scratch;
    if (scratch_bytes != 0) scratch = engine.take_scratch(scratch_bytes);
    for (size_t w = 0; w < count; ++w) {
        ways[w].make(kernels, call, parts[0].weight.cols, scratch.data() + offsets[w]);
    }

    int64_t steps[kLinearParts];
    int64_t tasks = 0;
    for (size_t p = 0; p < parts.size(); ++p) {
        const Matrix& weight = parts[p].weight;
        steps[p] = rows_of_task(weight, all_rows, call.tokens, engine.pool().threads());
        tasks += (weight.rows + steps[p] - 1) / steps[p];
    }
    engine.pool().run(tasks, [&](int64_t task) noexcept {
        for (size_t p = 0;; ++p) {
            const int64_t rows = parts[p].weight.rows;
            const int64_t mine = (rows + steps[p] - 1) / steps[p];
            if (task < mine) {
                const int64_t first = task * steps[p];
                return multiply_rows(kernels, call, parts[p], *tokens_of[p], first,
                                     std::min(steps[p], rows - first));
            }
            task -= mine;
        }
    });
    if (scratch_bytes != 0) engine.give_scratch(std::move(scratch));
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
