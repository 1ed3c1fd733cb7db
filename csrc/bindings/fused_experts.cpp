// The fused experts over a cache for Python.
#include "experts/fused_experts.h"

#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "bindings/ids.h"
#include "bindings/tensor_view.h"

namespace py = pybind11;

namespace moeinf {
namespace {

// None, and nothing is done, for tensors that are not plain ones of the right shapes and types:
// the caller then says what is wrong, or makes them plain.
py::object fused_experts_of(ExpertCache& cache, CpuEngine& engine, const ExpertFfn& expert,
                            py::handle hidden, py::handle topk_ids, py::handle topk_weights,
                            LayerId layer, bool prefill, bool new_sequence, int64_t caller,
                            int64_t sequences, size_t scratch_bytes) {
    const TensorView x(hidden);
    const TensorView ids(topk_ids);
    const TensorView weights(topk_weights);
    const bool plain = x.is_plain_matrix(expert.hidden()) && ids.is_plain_matrix() &&
                       weights.is_plain_matrix(ids.columns()) && ids.rows() == x.rows() &&
                       weights.rows() == x.rows();
    if (!plain || !x.floats() || !weights.floats() || !ids.ints_of_64()) return py::none();
    const FfnInput input{.hidden = x.data(),
                         .hidden_dtype = *x.floats(),
                         .topk_ids = ids.data(),
                         .ids_are_int64 = *ids.ints_of_64(),
                         .topk_weights = weights.data(),
                         .topk_weights_dtype = *weights.floats(),
                         .tokens = x.rows(),
                         .top_k = ids.columns(),
                         .num_experts = cache.catalog().num_experts()};
    const PassOfStep pass{layer, prefill, new_sequence, caller, sequences, scratch_bytes};
    py::object out = x.new_rows(expert.hidden());
    void* y = TensorView(out).data();
    const py::gil_scoped_release unlocked;
    fused_experts(cache, engine, expert, input, pass, y, *x.floats());
    return out;
}

}  // namespace

void bind_fused_experts(py::module_& module) {
    module.def("fused_experts", &fused_experts_of, py::arg("cache"), py::arg("engine"),
               py::arg("expert"), py::arg("hidden"), py::arg("topk_ids"), py::arg("topk_weights"),
               py::arg("layer"), py::arg("prefill"), py::arg("new_sequence"), py::arg("caller"),
               py::arg("sequences"), py::arg("scratch_bytes"),
               "A new tensor [tokens, hidden]; see moeinf.fused_experts. None for tensors that are "
               "not contiguous ones in RAM of the right shapes and types.");
}

}  // namespace moeinf
