// A panel of packed weights for the matrix unit of x86: 32 outputs by 256 columns as bf16, and
// their scales. Included only by packed_tiles_amx.cpp; unnamed for the reason float_math.h gives.
#pragma once

#include "cpu_kernels/tile_block_codes.h"
#include "cpu_kernels/tile_codes.h"

namespace moeinf {
namespace {

constexpr int64_t kOutputs = 2 * kTileRows;
constexpr int64_t kPanelScales = kPanelDepth / 16;

// What all panels of a product share.
struct Form {
    const DotJob& job;
    int64_t group;   // columns that share a scale
    int64_t step;    // columns of a tile
    bool folded;     // weights are multiplied by their scales as they are decoded
    int64_t minima;  // floats from the scales of a row to its minima; 0: there are none
    int64_t bytes;   // of kPanelDepth columns
};

struct Panel {
    const std::byte* w;  // its first row, from its first column on
    int64_t ahead;       // bytes from a row to what is prefetched
    int64_t output;      // of the matrix
    int64_t outputs;     // 1 to 32
    int64_t first;       // column
    int64_t columns;
    int64_t first_group;
    int64_t groups;  // that have columns in it
    bool ends;       // whether one of them ends in it
    bool folded;
    bool far;                        // its scales do not allow it to be folded
    int64_t group_at[kPanelScales];  // where there are zero points: of 16 columns
    alignas(64) std::byte weights[kPanelDepth / kTileDepth][2][kTileBytes];
    alignas(64) float scales[kOutputs][kPanelScales];  // from the first group on
};

// The panel at these columns of these outputs.
void place(const Form& form, int64_t output, int64_t first, Panel& panel) {
    const DotJob& job = form.job;
    const int64_t before = first / kPanelDepth * form.bytes;
    panel.w = job.w + output * job.w_stride + before;
    panel.ahead = first + kPanelDepth < job.depth ? form.bytes : kOutputs * job.w_stride - before;
    panel.output = output;
    panel.outputs = std::min(kOutputs, job.outputs - output);
    panel.first = first;
    panel.columns = std::min(kPanelDepth, job.depth - first);
    panel.folded = form.folded;
    panel.far = false;
    const int64_t last = first + panel.columns;
    panel.first_group = first / form.group;
    panel.groups = (last - 1) / form.group - panel.first_group + 1;
    panel.ends = last == job.depth || last >= (panel.first_group + 1) * form.group;
    if (job.zeros == nullptr) return;
    for (int64_t i = 0; i < kPanelScales; ++i) {
        panel.group_at[i] = std::min(first + 16 * i, job.depth - 1) / form.group;
    }
}

// The row of scales of an output.
int64_t scale_row(const DotJob& job, int64_t output) {
    const int64_t rows = job.how->block_rows;
    return rows == 1 ? job.first + output : (job.first + output) / rows;
}

void scales_beside(const DotJob& job, const Panel& panel, int64_t n, float* to) {
    const std::byte* from = job.scales + scale_row(job, panel.output + n) * job.how->rows.stride +
                            panel.first_group * scale_bytes(job.how->type);
    const auto load = [&]<class Number>(Number /*type*/) {
        F::store(to, F::load_first(reinterpret_cast<const Number*>(from), panel.groups));
    };
    switch (job.how->type) {
        case ScaleType::kF32:
            return load(float{});
        case ScaleType::kBF16:
            return load(BF16{});
        case ScaleType::kF16:
            return load(F16{});
        case ScaleType::kE8M0:
            return load(E8M0{});
        case ScaleType::kE4M3:
            return load(E4M3{});
    }
}

// Decodes row n of a panel.
template <class Codes>
void decode(const Form& form, Panel& panel, int64_t n) {
    const DotJob& job = form.job;
    const std::byte* w = panel.w + n * job.w_stride;
    if (job.from_memory) {
        for (int64_t i = 0; i < Codes::kBytes; i += kLine) {
            __builtin_prefetch(w + panel.ahead + i, 0, 2);
        }
    }
    if constexpr (requires { Codes::kGroup; }) {
        Codes::scales(w, panel.columns, panel.scales[n]);
    } else if constexpr (requires { Codes::kFolded; }) {
        // They are in the weights.
    } else if (job.how == nullptr) {
        panel.scales[n][0] = 1;
    } else if (panel.ends) {
        scales_beside(job, panel, n, panel.scales[n]);
    }
    [[maybe_unused]] const std::byte* scales = nullptr;
    if (panel.folded && job.how != nullptr) {
        scales = job.scales + scale_row(job, panel.output + n) * job.how->rows.stride +
                 panel.first_group;
    }
    [[maybe_unused]] const std::byte* zeros = nullptr;
    if constexpr (requires { Codes::zero(0, 0); }) {
        zeros = job.zeros + scale_row(job, panel.output + n) * job.how->zeros->stride;
    }
    [[maybe_unused]] bool far = false;
    std::byte* to = panel.weights[0][n / kTileRows] + n % kTileRows * kLine;
    const auto tile = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
        __m512i weights;
        if constexpr (requires { Codes::zero(0, 0); }) {
            const auto zero = [&](int64_t at) {
                return static_cast<int>(static_cast<int8_t>(zeros[panel.group_at[at / 16]]));
            };
            weights = Codes::load(w, k, count, Codes::zero(zero(k), zero(k + 16)));
        } else if constexpr (requires { Codes::kFolded; }) {
            weights = Codes::load(w, k, count, scales, far);
        } else {
            weights = Codes::load(w, k, count);
        }
        _mm512_store_si512(to + k / kTileDepth * sizeof panel.weights[0], weights);
    };
    if (panel.columns == kPanelDepth) {
#pragma GCC unroll 8
        for (int64_t k = 0; k < kPanelDepth; k += kTileDepth) tile(k, kTileDepth);
    } else {
        for (int64_t k = 0; k < panel.columns; k += kTileDepth) {
            tile(k, std::min(kTileDepth, panel.columns - k));
        }
    }
    panel.far |= far;
}

using DecodeRow = void (*)(const Form& form, Panel& panel, int64_t n);

// The decoding of a panel, some rows at a time.
struct Decoding {
    const Form& form;
    Panel& panel;
    DecodeRow row;
    DecodeRow plain;    // of codes that cannot be folded
    int64_t rows = 0;   // to decode
    int64_t share = 0;  // rows at a time
    int64_t done = 0;

    void some() {
        for (const int64_t end = std::min(rows, done + share); done < end; ++done) {
            row(form, panel, done);
        }
    }
    void rest() {
        for (; done < rows; ++done) row(form, panel, done);
        if (!panel.far || rows == 0) return;
        panel.far = panel.folded = false;
        for (int64_t n = 0; n < rows; ++n) plain(form, panel, n);
    }
};

}  // namespace
}  // namespace moeinf
