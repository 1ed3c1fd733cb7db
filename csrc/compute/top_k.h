// The largest of a router's probabilities, with the bits and the choice among equal ones that torch
// makes: its sort is that of the C++ library over the same pairs. Whoever replaces torch's compares
// both first.
#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace moeinf {

struct TopKCall {
    const float* probabilities;  // [tokens, experts]
    int64_t tokens;
    int64_t experts;
    int64_t top_k;
    bool share_out;  // each is divided by the sum of those that were chosen
    void* weights;   // [tokens, top_k]
    DType dtype;     // of the weights: bf16 or f32
    int64_t* ids;    // [tokens, top_k]
};

void top_k(const TopKCall& call);

}  // namespace moeinf
