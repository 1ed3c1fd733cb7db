#include "experts/fused_experts.h"

#include <vector>

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

void fused_experts(ExpertCache& cache, CpuEngine& engine, const ExpertFfn& expert,
                   const FfnInput& input, const PassOfStep& pass, void* out, DType out_dtype) {
    in_parts(engine, expert, input, out, out_dtype, [&](ExpertFfnCall& call, bool first) {
        run_call(cache, call,
                 {.layer = pass.layer,
                  .experts = call.experts(),
                  .counts = call.counts(),
                  .prefill = pass.prefill,
                  .new_sequence = pass.new_sequence && first,
                  .caller = pass.caller});
    });
}

}  // namespace moeinf
