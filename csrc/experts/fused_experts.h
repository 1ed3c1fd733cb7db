// One MoE layer over a cache whose slots lie in RAM: computes experts as the cache hands them out,
// so that those already resident are computed while the others are read.
#pragma once

#include <algorithm>

#include "cache/expert_cache.h"
#include "compute/cpu_engine.h"
#include "compute/expert_ffn.h"

namespace moeinf {

// What a step says of its pass; see StepRequest.
struct PassOfStep {
    LayerId layer{0};
    bool prefill = false;
    bool new_sequence = false;
    int64_t caller = 0;
    int64_t sequences = 1;     // of equal length, one after another
    size_t scratch_bytes = 0;  // see most_tokens()
};

// Writes out [tokens, hidden]. A prompt whose scratch memory has no room is cut into equal parts;
// each is a step of its own.
void fused_experts(ExpertCache& cache, CpuEngine& engine, const ExpertFfn& expert,
                   const FfnInput& input, const PassOfStep& pass, void* out, DType out_dtype);

// The most tokens of one call. Each call reads the experts that are not resident, so a prompt in
// several calls reads them several times. With scratch_bytes = 0 a call takes what it needs, up to
// a quarter of the memory that is free: the rest is for the model's other activations.
[[nodiscard]] int64_t most_tokens(CpuEngine& engine, const ExpertFfn& expert, const FfnInput& input,
                                  size_t scratch_bytes);

// `compute(call, first)` computes all experts of each part of the input, of at most so many tokens.
template <class Compute>
void in_parts(CpuEngine& engine, const ExpertFfn& expert, const FfnInput& input, void* out,
              DType out_dtype, int64_t most, const Compute& compute) {
    const int64_t parts = (input.tokens + most - 1) / most;
    if (parts > 1) most = (input.tokens + parts - 1) / parts;
    const auto rows = [](const void* base, int64_t first, int64_t width, size_t element) {
        return static_cast<const std::byte*>(base) + static_cast<size_t>(first * width) * element;
    };
    FfnInput part = input;
    part.whole_tokens = input.tokens;
    for (int64_t first = 0; first < input.tokens; first += most) {
        part.tokens = std::min(most, input.tokens - first);
        part.hidden = rows(input.hidden, first, expert.hidden(), dtype_bytes(input.hidden_dtype));
        part.topk_ids = rows(input.topk_ids, first, input.top_k, input.ids_are_int64 ? 8 : 4);
        part.topk_weights =
            rows(input.topk_weights, first, input.top_k, dtype_bytes(input.topk_weights_dtype));
        ExpertFfnCall call(engine, expert, part);
        compute(call, first == 0);
        const size_t done = static_cast<size_t>(first * expert.hidden()) * dtype_bytes(out_dtype);
        call.finish(static_cast<std::byte*>(out) + done, out_dtype);
    }
}

}  // namespace moeinf
