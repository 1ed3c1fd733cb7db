// Linear layers for a few tokens, over tensors that the Python caller has checked and keeps alive.
#include "compute/linear.h"

#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "compute/cpu_engine.h"
#include "compute/formats/formats.h"

namespace py = pybind11;

namespace moeinf {
namespace {

WeightFormat format_of(DType dtype) {
    static const WeightFormat formats[] = {find_format("bf16"), find_format("f16"),
                                           find_format("f32")};
    return formats[static_cast<size_t>(dtype)];
}

// Positional, for the call itself must take about a microsecond.
void linear_raw(CpuEngine& engine, DType dtype, uintptr_t weight, int64_t rows, int64_t cols,
                int64_t stride, uintptr_t bias, uintptr_t x, int64_t tokens, int64_t x_stride,
                uintptr_t out) {
    const Matrix matrix{.format = format_of(dtype),
                        .rows = rows,
                        .cols = cols,
                        .values = {0, stride * static_cast<int64_t>(dtype_bytes(dtype))}};
    linear(engine, matrix, reinterpret_cast<const std::byte*>(weight),
           {.x = reinterpret_cast<const void*>(x),
            .x_dtype = dtype,
            .x_stride = x_stride,
            .tokens = tokens,
            .bias = reinterpret_cast<const std::byte*>(bias),
            .bias_dtype = dtype,
            .out = reinterpret_cast<void*>(out)});
}

}  // namespace

void bind_linear(py::module_& module) {
    module.attr("LINEAR_TOKENS") = kLinearTokens;
    module.def("linear", &linear_raw, py::arg("engine"), py::arg("dtype"), py::arg("weight"),
               py::arg("rows"), py::arg("cols"), py::arg("stride"), py::arg("bias"), py::arg("x"),
               py::arg("tokens"), py::arg("x_stride"), py::arg("out"),
               py::call_guard<py::gil_scoped_release>(),
               "Writes x @ weight^T + bias to [tokens, rows] at the address `out`, all of one "
               "dtype. Strides are in elements; a bias of 0 is none.");
}

}  // namespace moeinf
