// The choice of a router over tensors of the Python caller.
#include "compute/top_k.h"

#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "bindings/tensor_view.h"

namespace py = pybind11;

namespace moeinf {
namespace {

py::object top_k_of(py::handle probabilities, py::handle like, int64_t k, bool share_out) {
    const TensorView from(probabilities);
    const TensorView type(like);
    if (!from.is_plain_matrix() || !from.can_make() || from.floats() != DType::kF32 ||
        !type.can_make() || type.dimensions() != 2 || type.rows() != from.rows() ||
        !type.floats() || type.floats() == DType::kF16 || from.rows() < 1 || k < 1 ||
        k > from.columns()) {
        return py::none();
    }
    py::object weights = type.new_rows(k);
    py::object ids = from.new_ids(k);
    const TopKCall call{.probabilities = static_cast<const float*>(from.data()),
                        .tokens = from.rows(),
                        .experts = from.columns(),
                        .top_k = k,
                        .share_out = share_out,
                        .weights = TensorView(weights).data(),
                        .dtype = *type.floats(),
                        .ids = static_cast<int64_t*>(TensorView(ids).data())};
    {
        const py::gil_scoped_release unlocked;
        top_k(call);
    }
    return py::make_tuple(std::move(weights), std::move(ids));
}

}  // namespace

void bind_top_k(py::module_& module) {
    module.def("top_k", &top_k_of, py::arg("probabilities"), py::arg("like"), py::arg("k"),
               py::arg("share_out"),
               "(weights, ids) of the k largest of each row, of the type of `like` and int64. None "
               "for tensors that are not plain ones in RAM.");
}

}  // namespace moeinf
