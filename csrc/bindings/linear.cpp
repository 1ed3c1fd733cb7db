// Linear layers for a few tokens, over tensors of the Python caller.
#include "compute/linear.h"

#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "bindings/tensor_view.h"
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

// The product of 1 to `most` tokens with a weight of `rows` x `cols`. None, and nothing is done,
// for tensors that are not rows of numbers of one type in RAM.
py::object product(CpuEngine& engine, const Matrix& weight, const void* base, const TensorView& x,
                   py::handle bias, py::handle out, int64_t most) {
    const auto tokens = x.as_rows();
    if (!tokens || !x.floats() || tokens->columns != weight.cols || tokens->columns == 0 ||
        tokens->count < 1 || tokens->count > most) {
        return py::none();
    }
    LinearCall call{.x = x.data(),
                    .x_dtype = *x.floats(),
                    .x_stride = tokens->stride,
                    .tokens = tokens->count,
                    .bias_dtype = *x.floats()};
    if (!bias.is_none()) {
        const TensorView added(bias);
        const auto row = added.as_rows();
        if (!added.is_plain_vector() || row->columns != weight.rows ||
            added.floats() != x.floats()) {
            return py::none();
        }
        call.bias = static_cast<const std::byte*>(added.data());
    }
    py::object made =
        out.is_none() ? x.new_rows(weight.rows) : py::reinterpret_borrow<py::object>(out);
    call.out = TensorView(made).data();
    const py::gil_scoped_release unlocked;
    linear(engine, weight, static_cast<const std::byte*>(base), call);
    return made;
}

py::object linear_of(CpuEngine& engine, py::handle x, py::handle weight, py::handle bias,
                     py::handle out, int64_t most, int64_t most_of_bf16) {
    const TensorView tokens(x);
    const TensorView w(weight);
    const auto rows = w.as_rows();
    if (w.dimensions() != 2 || !rows || !w.floats() || w.floats() != tokens.floats()) {
        return py::none();
    }
    const DType dtype = *w.floats();
    const Matrix matrix{.format = format_of(dtype),
                        .rows = rows->count,
                        .cols = rows->columns,
                        .values = {0, rows->stride * static_cast<int64_t>(dtype_bytes(dtype))}};
    return product(engine, matrix, w.data(), tokens, bias, out,
                   dtype == DType::kBF16 ? most_of_bf16 : most);
}

py::object packed_linear_of(CpuEngine& engine, py::handle x, const LinearWeight& weight,
                            py::handle packed, py::handle bias, py::handle out) {
    const TensorView bytes(packed);
    if (!bytes.is_plain_vector() || !bytes.bytes()) return py::none();
    return product(engine, weight.matrix, bytes.data(), TensorView(x), bias, out, kLinearTokens);
}

}  // namespace

void bind_linear(py::module_& module) {
    module.attr("LINEAR_TOKENS") = kLinearTokens;
    module.def("linear", &linear_of, py::arg("engine"), py::arg("x"), py::arg("weight"),
               py::arg("bias"), py::arg("out"), py::arg("most"), py::arg("most_of_bf16"),
               "x @ weight^T + bias as a tensor [..., rows]: `out`, or a new one where that is "
               "None. None for more tokens than the most, and for tensors that are not rows of "
               "numbers of one type in RAM.");
    py::class_<LinearWeight>(module, "LinearWeight",
                             "A matrix that the kernels can multiply; ValueError for any other.")
        .def(py::init<const Matrix&>(), py::arg("matrix"));
    module.def("packed_linear", &packed_linear_of, py::arg("engine"), py::arg("x"),
               py::arg("weight"), py::arg("packed"), py::arg("bias"), py::arg("out"),
               "The same with a weight whose offsets count from the first byte of `packed`.");
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
