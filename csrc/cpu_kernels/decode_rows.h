// Rows of a matrix as numbers, for products that want them so: written once over a `Floats` type
// and compiled for each instruction set (included only by kernels_*.cpp; unnamed for the reason
// float_math.h gives).
//
//   out[n][k] = (w[n][k] - zero) * scale * multiplier, or w[n][k] * scale - minimum
//
// Each product is rounded to a 32-bit float, and the result to the type of `out`.
#pragma once

#include <cstring>

#include "cpu_kernels/dot_scaled.h"
#include "cpu_kernels/formats/ggml.h"
#include "cpu_kernels/palette_rows.h"

namespace moeinf {
namespace {

constexpr int64_t kDecodedCols = 1024;  // that are decoded at a time: whole blocks

// out[i] = (x[i] - zero) * scale * multiplier.
template <class F, class Out>
inline void scale_run(const float* x, int64_t count, float zero, float scale, float multiplier,
                      Out* out) {
    const auto of = [&](typename F::Vec v) {
        return F::mul(F::mul(F::sub(v, F::splat(zero)), F::splat(scale)), F::splat(multiplier));
    };
    int64_t i = 0;
    for (; i + F::kLanes <= count; i += F::kLanes) F::store(out + i, of(F::load(x + i)));
    if (i < count) F::store_first(out + i, of(F::load_first(x + i, count - i)), count - i);
}

// out[i] = x[i] * scale - minimum.
template <class F, class Out>
inline void scale_block(const float* x, int64_t count, float scale, float minimum, Out* out) {
    for (int64_t i = 0; i < count; i += F::kLanes) {
        const auto scaled = F::mul(F::load(x + i), F::splat(scale));
        F::store(out + i, F::sub(scaled, F::splat(minimum)));
    }
}

template <class F, class Decoder>
inline void widen_values(const std::byte* row, int64_t first, int64_t count, float* to) {
    if constexpr (Decoder::kPack == 1) {
        widen_row<F>(reinterpret_cast<const typename Decoder::Stored*>(row) + first, count, to);
    } else {
        const std::byte* from = row + first / 2;
        int64_t i = 0;
        for (; i + F::kLanes <= count / 2; i += F::kLanes) {
            const auto words = F::load_bytes(from + i);
            F::store_in_turn(to + 2 * i, F::template look_up<0>(words, Decoder::kTable),
                             F::template look_up<4>(words, Decoder::kTable));
        }
        for (; i < count / 2; ++i) {
            const auto byte = static_cast<size_t>(from[i]);
            to[2 * i] = Decoder::kTable[byte % 16];
            to[2 * i + 1] = Decoder::kTable[byte / 16];
        }
    }
}

template <class F, class Decoder, class Out>
inline void decode_scaled_row(const DotJob& job, const std::byte* row, const float* scales,
                              const float* zeros, Out* out) {
    const int64_t group =
        job.how == nullptr || job.how->block_cols == 0 ? job.depth : job.how->block_cols;
    float values[kDecodedCols];
    for (int64_t k = 0; k < job.depth; k += kDecodedCols) {
        const int64_t end = k + kDecodedCols < job.depth ? k + kDecodedCols : job.depth;
        widen_values<F, Decoder>(row, k, end - k, values);
        int64_t g = k / group;
        for (int64_t at = k; at < end; ++g) {
            const int64_t last = (g + 1) * group < end ? (g + 1) * group : end;
            scale_run<F>(values + (at - k), last - at, zeros[g], scales[g], job.multiplier,
                         out + at);
            at = last;
        }
    }
}

// The numbers that the codes of a block stand for, by column.
template <class F, class D>
inline void widen_block(const std::byte* block, float* to) {
    if constexpr (D::kPack == D::kCodes) {
        widen_row<F>(reinterpret_cast<const int8_t*>(block + D::kFirst), D::kPack, to);
    } else if constexpr (D::kCodes == 16 && D::kHighBits != 0) {
        uint32_t fifth;
        std::memcpy(&fifth, block + D::kHigh, sizeof fifth);
        for (int64_t i = 0; i < D::kCodes; ++i) {
            const auto code = static_cast<uint32_t>(block[D::kFirst + i]);
            to[i] = D::kTable[code & 15] + D::kHighTable[fifth >> i & 1];
            to[i + 16] = D::kTable[code >> 4] + D::kHighTable[fifth >> (i + 16) & 1];
        }
    } else {
        for (int64_t i = 0; i < D::kCodes; i += F::kLanes) {
            const auto codes = [&] {
                if constexpr (D::kBits == 4)
                    return F::load_bytes(block + D::kFirst + i);
                else
                    return F::load_bytes(block + D::kFirst + D::code_byte(i), D::code_shift(i));
            }();
            auto low = F::template look_up<0>(codes, D::kTable);
            auto up = F::template look_up<D::kBits>(codes, D::kTable);
            if constexpr (D::kHighBits != 0) {
                const auto high =
                    F::load_bytes(block + D::kHigh + D::high_byte(i), D::high_shift(i));
                low = F::add(low, F::template look_up<0>(high, D::kHighTable));
                up = F::add(up, F::template look_up<D::kHalfShift>(high, D::kHighTable));
            }
            F::store(to + D::column(i, 0), low);
            F::store(to + D::column(i, 1), up);
        }
    }
}

template <class F, class D, class Out>
inline void decode_blocks(const DotJob& job, Out* out) {
    constexpr auto kSize = static_cast<int64_t>(sizeof(typename D::Stored));
    const int64_t blocks = job.depth / D::kPack;
    float scales[kScaleOutputs * ScaleJob<F>::kRow];
    float minima[kScaleOutputs * ScaleJob<F>::kRow];
    float values[D::kPack];
    for (int64_t n = 0; n < job.outputs; n += kScaleOutputs) {
        const int64_t count = job.outputs - n < kScaleOutputs ? job.outputs - n : kScaleOutputs;
        const std::byte* rows = job.w + n * job.w_stride;
        D::template scales<F>(
            {rows, job.w_stride, static_cast<int>(count), blocks, scales, minima});
        for (int64_t r = 0; r < count; ++r, out += job.depth) {
            for (int64_t b = 0; b < blocks; ++b) {
                widen_block<F, D>(rows + r * job.w_stride + b * kSize, values);
                for (int64_t k = 0; k < D::kPack; k += D::kGroup) {
                    const int64_t at = r * ScaleJob<F>::kRow + (b * D::kPack + k) / D::kGroup;
                    scale_block<F>(values + k, D::kGroup, scales[at],
                                   D::kMinima ? minima[at] : 0.0f, out + b * D::kPack + k);
                }
            }
        }
    }
}

template <class F, class Decoder, class Out>
inline void decode_as(const DotJob& job, Out* out) {
    if constexpr (requires { Decoder::kBlock; }) {
        decode_blocks<F, Decoder>(job, out);
    } else if constexpr (is_palette<Decoder>) {
        const float one[] = {1};
        const float zero[] = {0};
        const PaletteJob rows(job, Decoder::kRare);
        BF16 row[kMostPaletteCols];
        for (int64_t n = 0; n < job.outputs; ++n, out += job.depth) {
            expand_row<F>(rows, n, row);
            decode_scaled_row<F, Bf16Weights>(job, reinterpret_cast<const std::byte*>(row), one,
                                              zero, out);
        }
    } else {
        float scales[kMaxScales + 64] = {1};
        float zeros[kMaxScales + 64] = {};
        const int64_t count = job.how == nullptr ? 1 : job.how->count(job.depth);
        for (int64_t n = 0; n < job.outputs; ++n, out += job.depth) {
            if (job.how != nullptr) {
                const int64_t row = (job.first + n) / job.how->block_rows;
                widen_scales<F>(job.scales + row * job.how->rows.stride, job.how->type, count,
                                scales);
                if (job.zeros != nullptr) {
                    const std::byte* from = job.zeros + row * job.how->zeros->stride;
                    widen_row<F>(reinterpret_cast<const int8_t*>(from), count, zeros);
                }
            }
            decode_scaled_row<F, Decoder>(job, job.w + n * job.w_stride, scales, zeros, out);
        }
    }
}

template <class F, class Decoder>
void decode_rows(const DotJob& job, void* out, DType dtype) {
    switch (dtype) {
        case DType::kBF16:
            return decode_as<F, Decoder>(job, static_cast<BF16*>(out));
        case DType::kF16:
            return decode_as<F, Decoder>(job, static_cast<F16*>(out));
        case DType::kF32:
            return decode_as<F, Decoder>(job, static_cast<float*>(out));
    }
}

}  // namespace
}  // namespace moeinf
