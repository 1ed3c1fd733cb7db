// One call of the fused experts over a cache: computes experts as the cache hands them out, so that
// those already resident are computed while the others are read.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/ids.h"
#include "cache/expert_cache.h"
#include "compute/cpu_engine.h"
#include "compute/expert_ffn.h"

namespace py = pybind11;

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

// A long prompt is cut so that scratch memory stays bounded; each part is a step of its own.
void fused_experts(ExpertCache& cache, CpuEngine& engine, const ExpertFfn& expert, FfnInput input,
                   LayerId layer, uintptr_t out, DType out_dtype, bool prefill, bool new_sequence,
                   int64_t caller) {
    const int64_t tokens = input.tokens;
    const int64_t most = ExpertFfnCall::tokens_per_call(expert, input.top_k);
    const auto rows = [](const void* base, int64_t first, int64_t width, size_t element) {
        return static_cast<const std::byte*>(base) + static_cast<size_t>(first * width) * element;
    };
    const FfnInput whole = input;
    for (int64_t first = 0; first < tokens; first += most) {
        input.tokens = std::min(most, tokens - first);
        input.hidden = rows(whole.hidden, first, expert.hidden(), dtype_bytes(whole.hidden_dtype));
        input.topk_ids = rows(whole.topk_ids, first, whole.top_k, whole.ids_are_int64 ? 8 : 4);
        input.topk_weights =
            rows(whole.topk_weights, first, whole.top_k, dtype_bytes(whole.topk_weights_dtype));
        ExpertFfnCall call(engine, expert, input);
        run_call(cache, call,
                 {.layer = layer,
                  .experts = call.experts(),
                  .counts = call.counts(),
                  .prefill = prefill,
                  .new_sequence = new_sequence && first == 0,
                  .caller = caller});
        const size_t done = static_cast<size_t>(first * expert.hidden()) * dtype_bytes(out_dtype);
        call.finish(reinterpret_cast<std::byte*>(out) + done, out_dtype);
    }
}

}  // namespace

void bind_fused_experts(py::module_& module) {
    module.def("fused_experts", &fused_experts, py::arg("cache"), py::arg("engine"),
               py::arg("expert"), py::arg("input"), py::kw_only(), py::arg("layer"), py::arg("out"),
               py::arg("out_dtype"), py::arg("prefill"), py::arg("new_sequence"), py::arg("caller"),
               py::call_guard<py::gil_scoped_release>(),
               "Writes [tokens, hidden] to the address `out`; see moeinf.fused_experts.");
}

}  // namespace moeinf
