#include "experts/fused_experts.h"

#include <vector>

#include "memory/available.h"

namespace moeinf {
namespace {

void run_call(ExpertCache& cache, ExpertFfnCall& call, const StepRequest& request) {
    StepLease step = cache.begin_step(request);
    std::vector<ReadyExpert> ready;
    std::vector<SlotOfExpert> slots;
    while (step.wait_ready(ready)) {
        slots.clear();
        for (const ReadyExpert& expert : ready) {
            slots.push_back({expert.position, cache.pool().slot(expert.slot)});
        }
        call.compute(slots);
        for (const ReadyExpert& expert : ready) step.release(expert.position);
        ready.clear();
    }
}

}  // namespace

int64_t most_tokens(CpuEngine& engine, const ExpertFfn& expert, const FfnInput& input,
                    size_t scratch_bytes) {
    const auto with = [&](size_t bytes) {
        return ExpertFfnCall::tokens_per_call(engine.kernels(), expert, input, bytes);
    };
    if (scratch_bytes > 0) return with(scratch_bytes);
    const int64_t usual = with(CpuEngine::kUsualScratch);
    if (input.tokens <= usual) return usual;
    return std::max(usual, with((available_memory() + engine.kept_scratch()) / 4));
}

void fused_experts(ExpertCache& cache, CpuEngine& engine, const ExpertFfn& expert,
                   const FfnInput& input, const PassOfStep& pass, void* out, DType out_dtype) {
    const int64_t most = most_tokens(engine, expert, input, pass.scratch_bytes);
    const bool one_call = input.tokens <= most;
    const bool whole_rows = pass.sequences > 0 && input.tokens % pass.sequences == 0;
    const int64_t sequences = one_call && whole_rows ? pass.sequences : 1;
    const bool is_long =
        pass.prefill && Routing::is_long(input.tokens, input.top_k, input.num_experts);
    int64_t done = 0;
    in_parts(engine, expert, input, out, out_dtype, most, [&](ExpertFfnCall& call, bool first) {
        done += call.tokens();
        run_call(cache, call,
                 {.layer = pass.layer,
                  .experts = call.experts(),
                  .counts = call.counts(),
                  .recent = is_long ? call.recent(sequences) : std::span<const float>(),
                  .prefill = pass.prefill,
                  .new_sequence = pass.new_sequence && first,
                  .caller = pass.caller,
                  .reads_ahead = done == input.tokens});
    });
}

}  // namespace moeinf
