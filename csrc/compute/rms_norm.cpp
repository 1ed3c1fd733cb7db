#include "compute/rms_norm.h"

#include <algorithm>
#include <cmath>

#include "compute/bf16.h"
#include "compute/row_sum.h"

namespace moeinf {
namespace {

constexpr int64_t kTaskValues = 32768;

void scale_row(const RmsNorm& norm, const float* x, float r, const BF16* weight, int64_t cols,
               BF16* out) {
    for (int64_t i = 0; i < cols; ++i) {
        const float y = x[i] * r;
        out[i] = rounded((norm.offset + widened(weight[i])) *
                         (norm.rounds_first ? widened(rounded(y)) : y));
    }
}

void scale_row(const RmsNorm& norm, const float* x, float r, const float* weight, int64_t cols,
               float* out) {
    for (int64_t i = 0; i < cols; ++i) out[i] = (norm.offset + weight[i]) * (x[i] * r);
}

template <class T>
void rows_of(const CpuEngine& engine, const RmsNorm& norm, const NormCall& call, int64_t first,
             int64_t end) {
    float x[kNormColumns];
    float squares[kNormColumns];
    for (int64_t row = first; row < end; ++row) {
        engine.kernels().widen(static_cast<const T*>(call.x) + row * call.stride, call.dtype,
                               call.cols, x);
        for (int64_t i = 0; i < call.cols; ++i) squares[i] = x[i] * x[i];
        const float total = row_sum(squares, call.cols);
        const float r = 1.0f / std::sqrt(total / static_cast<float>(call.cols) + norm.epsilon);
        scale_row(norm, x, r, static_cast<const T*>(call.weight), call.cols,
                  static_cast<T*>(call.out) + row * call.cols);
    }
}

}  // namespace

void rms_norm(CpuEngine& engine, const RmsNorm& norm, const NormCall& call) {
    const auto rows_of_dtype = call.dtype == DType::kBF16 ? rows_of<BF16> : rows_of<float>;
    const int64_t step = std::max<int64_t>(1, kTaskValues / call.cols);
    if (call.rows <= step) return rows_of_dtype(engine, norm, call, 0, call.rows);
    engine.pool().run((call.rows + step - 1) / step, [&](int64_t task) noexcept {
        rows_of_dtype(engine, norm, call, task * step, std::min(call.rows, (task + 1) * step));
    });
}

void add(const void* one, const void* other, int64_t count, DType dtype, void* out) {
    if (dtype == DType::kBF16) {
        const auto* a = static_cast<const BF16*>(one);
        const auto* b = static_cast<const BF16*>(other);
        auto* to = static_cast<BF16*>(out);
        for (int64_t i = 0; i < count; ++i) to[i] = rounded(widened(a[i]) + widened(b[i]));
    } else {
        const auto* a = static_cast<const float*>(one);
        const auto* b = static_cast<const float*>(other);
        auto* to = static_cast<float*>(out);
        for (int64_t i = 0; i < count; ++i) to[i] = a[i] + b[i];
    }
}

}  // namespace moeinf
