// Linear layers for a few tokens, over tensors that the Python caller has checked and keeps alive.
#include "compute/linear.h"

#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "compute/cpu_engine.h"
#include "cpu_kernels/formats/formats.h"

namespace py = pybind11;

namespace moeinf {
namespace {

WeightFormat format_of(DType dtype) {
    static const WeightFormat formats[] = {find_format("bf16"), find_format("f16"),
                                           find_format("f32")};
    return formats[static_cast<size_t>(dtype)];
}

LinearCall call_of(DType dtype, uintptr_t bias, uintptr_t x, int64_t tokens, int64_t x_stride,
                   uintptr_t out) {
    return {.x = reinterpret_cast<const void*>(x),
            .x_dtype = dtype,
            .x_stride = x_stride,
            .tokens = tokens,
            .bias = reinterpret_cast<const std::byte*>(bias),
            .bias_dtype = dtype,
            .out = reinterpret_cast<void*>(out)};
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
           call_of(dtype, bias, x, tokens, x_stride, out));
}

void packed_linear_raw(CpuEngine& engine, DType dtype, const LinearWeight& weight, uintptr_t base,
                       uintptr_t bias, uintptr_t x, int64_t tokens, int64_t x_stride,
                       uintptr_t out) {
    linear(engine, weight.matrix, reinterpret_cast<const std::byte*>(base),
           call_of(dtype, bias, x, tokens, x_stride, out));
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
    py::class_<LinearWeight>(module, "LinearWeight",
                             "A matrix that the kernels can multiply; ValueError for any other.")
        .def(py::init<const Matrix&>(), py::arg("matrix"));
    module.def("packed_linear", &packed_linear_raw, py::arg("engine"), py::arg("dtype"),
               py::arg("weight"), py::arg("base"), py::arg("bias"), py::arg("x"), py::arg("tokens"),
               py::arg("x_stride"), py::arg("out"), py::call_guard<py::gil_scoped_release>(),
               "The same with a weight whose offsets count from the address `base`.");
    module.def(
        "decode",
        [](CpuEngine& engine, DType dtype, const LinearWeight& weight, uintptr_t base,
           int64_t first, int64_t count, uintptr_t out) {
            decode(engine, weight.matrix, reinterpret_cast<const std::byte*>(base), first, count,
                   reinterpret_cast<void*>(out), dtype);
        },
        py::arg("engine"), py::arg("dtype"), py::arg("weight"), py::arg("base"), py::arg("first"),
        py::arg("count"), py::arg("out"), py::call_guard<py::gil_scoped_release>(),
        "Writes rows of such a weight to [count, cols] at the address `out`.");
}

}  // namespace moeinf
