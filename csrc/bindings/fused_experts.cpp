// The fused experts over a cache for Python, which has checked the tensors behind the addresses.
#include "experts/fused_experts.h"

#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "bindings/ids.h"

namespace py = pybind11;

namespace moeinf {

void bind_fused_experts(py::module_& module) {
    module.def(
        "fused_experts",
        [](ExpertCache& cache, CpuEngine& engine, const ExpertFfn& expert, const FfnInput& input,
           LayerId layer, uintptr_t out, DType out_dtype, bool prefill, bool new_sequence,
           int64_t caller, int64_t sequences, size_t scratch_bytes) {
            fused_experts(cache, engine, expert, input,
                          {layer, prefill, new_sequence, caller, sequences, scratch_bytes},
                          reinterpret_cast<void*>(out), out_dtype);
        },
        py::arg("cache"), py::arg("engine"), py::arg("expert"), py::arg("input"), py::kw_only(),
        py::arg("layer"), py::arg("out"), py::arg("out_dtype"), py::arg("prefill"),
        py::arg("new_sequence"), py::arg("caller"), py::arg("sequences"), py::arg("scratch_bytes"),
        py::call_guard<py::gil_scoped_release>(),
        "Writes [tokens, hidden] to the address `out`; see moeinf.fused_experts.");
}

}  // namespace moeinf
