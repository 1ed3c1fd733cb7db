// Linear layers for a few tokens, over tensors of the Python caller.
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "bindings/linear_parts.h"
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

std::optional<LinearPart> part_of(const LinearCall& call, const Matrix& weight, const void* base,
                                  py::handle bias) {
    LinearPart part{
        .weight = weight, .base = static_cast<const std::byte*>(base), .bias_dtype = call.x_dtype};
    if (!bias.is_none()) {
        const TensorView added(bias);
        const auto row = added.as_rows();
        if (!added.is_plain_vector() || row->columns != weight.rows ||
            added.floats() != call.x_dtype) {
            return std::nullopt;
        }
        part.bias = static_cast<const std::byte*>(added.data());
    }
    return part;
}

// `out` or a new tensor; None without a part, and for more than `most` tokens.
py::object product(CpuEngine& engine, const TensorView& x, const LinearCall& call,
                   std::optional<LinearPart> part, py::handle out, int64_t most) {
    if (!part || x.as_rows()->columns != part->weight.cols || call.tokens > most) {
        return py::none();
    }
    py::object made =
        out.is_none() ? x.new_rows(part->weight.rows) : py::reinterpret_borrow<py::object>(out);
    part->out = TensorView(made).data();
    const py::gil_scoped_release unlocked;
    linear(engine, call, {&*part, 1});
    return made;
}

py::object linear_of(CpuEngine& engine, py::handle x, py::handle weight, py::handle bias,
                     py::handle out, int64_t most, int64_t most_of_bf16) {
    const TensorView tokens(x);
    const auto call = linear_call(tokens);
    if (!call) return py::none();
    return product(engine, tokens, *call, plain_part(*call, TensorView(weight), bias), out,
                   call->x_dtype == DType::kBF16 ? most_of_bf16 : most);
}

py::object packed_linear_of(CpuEngine& engine, py::handle x, const LinearWeight& weight,
                            py::handle packed, py::handle bias, py::handle out) {
    const TensorView tokens(x);
    const auto call = linear_call(tokens);
    if (!call) return py::none();
    return product(engine, tokens, *call, packed_part(*call, weight, TensorView(packed), bias), out,
                   kLinearTokens);
}

}  // namespace

std::optional<LinearCall> linear_call(const TensorView& x) {
    const auto tokens = x.as_rows();
    if (!tokens || !x.floats() || tokens->columns == 0 || tokens->count < 1) return std::nullopt;
    return LinearCall{x.data(), *x.floats(), tokens->stride, tokens->count};
}

std::optional<LinearPart> plain_part(const LinearCall& call, const TensorView& weight,
                                     py::handle bias) {
    const auto rows = weight.as_rows();
    if (weight.dimensions() != 2 || !rows || weight.floats() != call.x_dtype) return std::nullopt;
    const Matrix matrix{
        .format = format_of(call.x_dtype),
        .rows = rows->count,
        .cols = rows->columns,
        .values = {0, rows->stride * static_cast<int64_t>(dtype_bytes(call.x_dtype))}};
    return part_of(call, matrix, weight.data(), bias);
}

std::optional<LinearPart> packed_part(const LinearCall& call, const LinearWeight& weight,
                                      const TensorView& packed, py::handle bias) {
    if (!packed.is_plain_vector() || !packed.bytes()) return std::nullopt;
    return part_of(call, weight.matrix, packed.data(), bias);
}

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
