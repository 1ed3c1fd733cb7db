// The queries, keys and values of an attention, of a few tokens, from their hidden states:
//
//   W x + bias -> norm of the row, or of each head (queries and keys, where there is one)
//              -> turned by their positions (queries and keys)
//
//   out[i]        = x[i] cos[i] - x[i + half] sin[i]          for i below half
//   out[i + half] = x[i + half] cos[i + half] + x[i] sin[i + half]
//
// Each product and each sum is rounded to the type of x, as torch's operators do it one after
// another.
#pragma once

#include <array>
#include <cstdint>

#include "compute/cpu_engine.h"
#include "compute/linear.h"
#include "compute/rms_norm.h"

namespace moeinf {

struct AttentionNorm {
    RmsNorm norm;
    int64_t cols;
    const void* weight;  // [cols]; null: no norm
};

// Of the type of x.
struct Turns {
    const void* cos;  // [batch, tokens, width], elements of a row beside each other
    const void* sin;
    int64_t batch_stride;  // 0: the same for all
    int64_t token_stride;
    int64_t turned;  // of the numbers of a head, the first ones; the others stay
    bool half;       // width is half of `turned`: both halves have the same cos and sin
};

struct AttentionCall {
    LinearCall linear;
    int64_t batch;
    std::array<LinearPart, 3> parts{};  // queries, keys, values; their `out` [batch, tokens, rows]
    std::array<AttentionNorm, 2> norms{};
    Turns turns{};
    int64_t head_dim;
};

// The types are bf16 or f32. Throws Error(kInvalid) as `linear` does.
void attention_inputs(CpuEngine& engine, const AttentionCall& call);

}  // namespace moeinf
