// Root mean square norms over tensors of the Python caller.
#include "compute/rms_norm.h"

#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "bindings/module_view.h"
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

// (residual + hidden, its norm).
py::object add_rms_norm_of(CpuEngine& engine, py::handle type, py::handle module,
                           py::handle residual, py::handle hidden) {
    const ModuleView view(module);
    if (!view.runs(type)) return py::none();
    const auto norm = norm_of(view);
    const TensorView one(residual);
    const TensorView other(hidden);
    const auto rows = one.as_rows();
    const auto others = other.as_rows();
    if (!norm || !rows || !others || rows->count < 1 || rows->count != others->count ||
        rows->columns != others->columns || rows->columns != norm->weight.size(0) ||
        rows->columns > kNormColumns || one.dimensions() != other.dimensions() ||
        (rows->count > 1 && (rows->stride != rows->columns || others->stride != rows->columns)) ||
        !one.floats() || one.floats() == DType::kF16 || other.floats() != one.floats() ||
        norm->weight.floats() != one.floats()) {
        return py::none();
    }
    for (int d = 0; d < one.dimensions(); ++d) {
        if (one.size(d) != other.size(d)) return py::none();
    }
    py::object sum = one.new_rows(rows->columns);
    py::object out = one.new_rows(rows->columns);
    void* added = TensorView(sum).data();
    const NormCall call{.x = added,
                        .stride = rows->columns,
                        .rows = rows->count,
                        .cols = rows->columns,
                        .weight = norm->weight.data(),
                        .out = TensorView(out).data(),
                        .dtype = *one.floats()};
    {
        const py::gil_scoped_release unlocked;
        add(one.data(), other.data(), rows->count * rows->columns, call.dtype, added);
        rms_norm(engine, norm->norm, call);
    }
    return py::make_tuple(std::move(sum), std::move(out));
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
    module.def("add_rms_norm", &add_rms_norm_of, py::arg("engine"), py::arg("type"),
               py::arg("module"), py::arg("residual"), py::arg("hidden"),
               "(residual + hidden, its norm) by a module of that type that `serve_norms` serves. "
               "None where it has hooks, and for tensors that are not rows of numbers of one type "
               "and shape in RAM.");
}

}  // namespace moeinf
