#include "compute/matrix_product.h"

#include <algorithm>
#include <cstring>

#include "base/sizes.h"
#include "cpu_kernels/formats/formats.h"

namespace moeinf {
namespace {

// Values of a bias that are widened at a time.
constexpr int64_t kBiasValues = 256;
constexpr size_t kAlign = 64;

}  // namespace

const Product& product_of(const KernelSet& kernels, const Matrix& matrix, DType dtype) {
    const FormatKernels& format = kernels.formats[static_cast<size_t>(matrix.format)];
    return dtype == DType::kBF16 ? format.bf16 : format.f32;
}

int64_t row_bytes(const Matrix& matrix) {
    return facts(matrix.format).row_bytes(matrix.cols);
}

size_t activation_row_bytes(const Product& product, size_t cols, DType dtype) {
    const auto step = static_cast<size_t>(product.step);
    const auto step_bytes = static_cast<size_t>(product.step_bytes);
    size_t bytes =
        round_up(cols, step) / step * (step_bytes == 0 ? step * dtype_bytes(dtype) : step_bytes);
    if (product.sums != 0) {
        bytes += round_up(cols / static_cast<size_t>(product.sums) * sizeof(float), kAlign);
    }
    return bytes;
}

void place(const Matrix& matrix, DotJob& job, const std::byte* base, int64_t first) noexcept {
    job.w = base + matrix.values.offset + static_cast<size_t>(first * matrix.values.stride);
    job.w_stride = matrix.values.stride;
    job.first = first;
    if (matrix.scales) {
        job.how = &*matrix.scales;
        job.scales = base + matrix.scales->rows.offset;
        if (matrix.scales->zeros) job.zeros = base + matrix.scales->zeros->offset;
    }
    if (matrix.multiplier) {
        std::memcpy(&job.multiplier, base + *matrix.multiplier, sizeof job.multiplier);
    }
}

void multiply(const KernelSet& kernels, const Matrix& matrix, void (*dot)(const DotJob&),
              DotJob& job, const std::byte* base, int64_t first) noexcept {
    place(matrix, job, base, first);
    dot(job);
    if (matrix.bias) {
        add_bias(kernels, base + matrix.bias->offset, matrix.bias->stride, matrix.bias_dtype, job);
    }
}

void add_bias(const KernelSet& kernels, const std::byte* bias, int64_t stride, DType dtype,
              const DotJob& job) noexcept {
    const size_t unit = dtype_bytes(dtype);
    std::byte packed[kBiasValues * sizeof(float)];
    float values[kBiasValues];
    for (int64_t n = 0; n < job.outputs; n += kBiasValues) {
        const int64_t count = std::min(kBiasValues, job.outputs - n);
        const std::byte* from = bias + static_cast<size_t>((job.first + n) * stride);
        for (int64_t i = 0; i < count; ++i, from += stride) {
            std::memcpy(packed + static_cast<size_t>(i) * unit, from, unit);
        }
        kernels.widen(packed, dtype, count, values);
        for (int64_t r = 0; r < job.rows; ++r) {
            float* y = job.y + r * job.y_stride + n;
            for (int64_t i = 0; i < count; ++i) y[i] += values[i];
        }
    }
}

}  // namespace moeinf
