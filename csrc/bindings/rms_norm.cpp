// Root mean square norms over tensors of the Python caller.
#include "compute/rms_norm.h"

#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "bindings/tensor_view.h"
#include "compute/cpu_engine.h"

namespace py = pybind11;

namespace moeinf {
namespace {

py::object rms_norm_of(CpuEngine& engine, const RmsNorm& norm, py::handle x, py::handle weight) {
    const TensorView from(x);
    const TensorView scales(weight);
    const auto rows = from.as_rows();
    const auto columns = scales.as_rows();
    if (!rows || !columns || !scales.is_plain_vector() || columns->columns != rows->columns ||
        rows->count < 1 || rows->columns < 1 || rows->columns > kNormColumns || !from.floats() ||
        from.floats() == DType::kF16 || scales.floats() != from.floats()) {
        return py::none();
    }
    py::object out = from.new_rows(rows->columns);
    const NormCall call{.x = from.data(),
                        .stride = rows->stride,
                        .rows = rows->count,
                        .cols = rows->columns,
                        .weight = scales.data(),
                        .out = TensorView(out).data(),
                        .dtype = *from.floats()};
    const py::gil_scoped_release unlocked;
    rms_norm(engine, norm, call);
    return out;
}

}  // namespace

void bind_rms_norm(py::module_& module) {
    py::class_<RmsNorm>(module, "RmsNorm", "How a norm is computed; see csrc/compute/rms_norm.h.")
        .def(py::init([](float epsilon, float offset, bool rounds_first) {
                 return RmsNorm{epsilon, offset, rounds_first};
             }),
             py::arg("epsilon"), py::arg("offset"), py::arg("rounds_first"));
    module.def("rms_norm", &rms_norm_of, py::arg("engine"), py::arg("norm"), py::arg("x"),
               py::arg("weight"),
               "The norm of each row of x as a new tensor. None for tensors that are not rows of "
               "numbers of one type in RAM.");
}

}  // namespace moeinf
