#include "compute/rms_norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "compute/bf16.h"

namespace moeinf {
namespace {

constexpr int kLanes = 8;      // of a register of torch's sums
constexpr int kColumns = 4;    // registers that torch adds to at a time
constexpr int kLevels = 4;     // sums of sums, so that long rows lose no accuracy
constexpr int kBlockBits = 4;  // of rows of no more than 2^20 numbers
constexpr int64_t kBlock = int64_t{1} << kBlockBits;
constexpr int64_t kTaskValues = 32768;

struct Sums {
    float of[kLevels][kColumns][kLanes] = {};

    void add(int level, const float* from) {
        for (int c = 0; c < kColumns; ++c) {
            for (int l = 0; l < kLanes; ++l) of[level][c][l] += from[c * kLanes + l];
        }
    }
};

// The sum of `squares` in the order of ATen's cascade_sum.
float sum(const float* squares, int64_t count) {
    constexpr int64_t kStep = int64_t{kColumns} * kLanes;
    Sums sums;
    const int64_t steps = count / kStep;
    int64_t i = 0;
    while (i + kBlock <= steps) {
        for (int64_t j = 0; j < kBlock; ++j, ++i) sums.add(0, squares + i * kStep);
        for (int level = 1; level < kLevels; ++level) {
            sums.add(level, sums.of[level - 1][0]);
            std::memset(sums.of[level - 1], 0, sizeof sums.of[0]);
            if ((i >> (level * kBlockBits)) % kBlock != 0) break;
        }
    }
    for (; i < steps; ++i) sums.add(0, squares + i * kStep);
    for (int level = 1; level < kLevels; ++level) sums.add(0, sums.of[level][0]);
    auto& columns = sums.of[0];
    const int64_t vectors = count / kLanes;
    for (int64_t v = steps * kColumns; v < vectors; ++v) {
        for (int l = 0; l < kLanes; ++l) columns[0][l] += squares[v * kLanes + l];
    }
    for (int c = 1; c < kColumns; ++c) {
        for (int l = 0; l < kLanes; ++l) columns[0][l] += columns[c][l];
    }
    float total = 0;
    for (int64_t k = vectors * kLanes; k < count; ++k) total += squares[k];
    for (int l = 0; l < kLanes; ++l) total += columns[0][l];
    return total;
}

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
        const float total = sum(squares, call.cols);
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

}  // namespace moeinf
