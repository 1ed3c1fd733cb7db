// Queries, keys and values in one call, over an attention module of the Python caller.
#include "compute/attention_inputs.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "bindings/bindings.h"
#include "bindings/module_view.h"

namespace py = pybind11;

namespace moeinf {
namespace {

constexpr std::array kProjections = {"q_proj", "k_proj", "v_proj"};
constexpr std::array kNorms = {"q_norm", "k_norm"};

// How the attentions of a class compute, and of which classes their parts are.
struct AttentionForm {
    std::array<py::object, 3> projections;
    std::array<bool, 3> packed;
    std::optional<std::array<py::object, 2>> norms;
    bool norms_rows;     // a whole row, not each head
    bool half;           // see Turns
    bool whole;          // all numbers of a head are turned
    bool heads_outside;  // queries and keys of more than one token lie head by head
    int64_t head_dim;
};

bool read_projections(const AttentionForm& form, const ModuleView& attention, int64_t columns,
                      int64_t most, int64_t most_of_bf16, AttentionCall& call) {
    for (size_t p = 0; p < kProjections.size(); ++p) {
        const ModuleView layer = attention.child(kProjections[p]);
        if (!layer.runs(form.projections[p])) return false;
        auto part = part_of(layer, form.packed[p], call.linear);
        const bool bf16 = !form.packed[p] && call.linear.x_dtype == DType::kBF16;
        if (!part || call.linear.tokens > (bf16 ? most_of_bf16 : most) ||
            part->weight.cols != columns || part->weight.rows < 1 ||
            part->weight.rows % form.head_dim != 0) {
            return false;
        }
        call.parts[p] = *part;
    }
    return true;
}

bool read_norms(const AttentionForm& form, const ModuleView& attention, AttentionCall& call) {
    if (!form.norms) return true;
    for (size_t p = 0; p < kNorms.size(); ++p) {
        const ModuleView module = attention.child(kNorms[p]);
        if (!module.runs((*form.norms)[p])) return false;
        const auto norm = norm_of(module);
        const int64_t cols = form.norms_rows ? call.parts[p].weight.rows : form.head_dim;
        if (!norm || norm->weight.size(0) != cols || cols > kNormColumns ||
            norm->weight.floats() != call.linear.x_dtype) {
            return false;
        }
        call.norms[p] = {norm->norm, cols, norm->weight.data()};
    }
    return true;
}

bool read_turns(const AttentionForm& form, const TensorView& x, py::handle cos, py::handle sin,
                AttentionCall& call) {
    const TensorView c(cos);
    const TensorView s(sin);
    const auto rows = c.as_rows();
    const auto sin_rows = s.as_rows();
    if (!rows || !sin_rows || c.dimensions() != 3 || s.dimensions() != 3) return false;
    const int64_t batch = c.size(0);
    const int64_t turned = rows->columns * (form.half ? 2 : 1);
    if ((batch != 1 && batch != x.size(0)) || c.size(1) != x.size(1) || turned > form.head_dim ||
        (form.whole && turned != form.head_dim) || turned % 2 != 0 ||
        c.floats() != call.linear.x_dtype || s.floats() != c.floats() ||
        rows->count != sin_rows->count || rows->columns != sin_rows->columns ||
        s.size(0) != batch) {
        return false;
    }
    if (rows->count > 1 && rows->stride != sin_rows->stride) return false;
    call.turns = {c.data(),     s.data(), batch == 1 ? 0 : x.size(1) * rows->stride,
                  rows->stride, turned,   form.half};
    return true;
}

py::object attention_inputs_of(CpuEngine& engine, const AttentionForm& form, py::handle module,
                               py::handle hidden, py::handle cos, py::handle sin, int64_t most,
                               int64_t most_of_bf16) {
    const TensorView x(hidden);
    const auto linear = linear_call(x);
    if (!linear || x.dimensions() != 3 || !x.can_make() || linear->x_dtype == DType::kF16) {
        return py::none();
    }
    AttentionCall call{.linear = *linear, .batch = x.size(0), .head_dim = form.head_dim};
    const ModuleView attention(module);
    if (!read_projections(form, attention, x.size(2), most, most_of_bf16, call) ||
        !read_norms(form, attention, call) || !read_turns(form, x, cos, sin, call) ||
        (form.heads_outside && x.size(1) != 1)) {
        return py::none();
    }
    py::tuple made(3);
    for (size_t p = 0; p < call.parts.size(); ++p) {
        py::object out = x.new_heads(x.size(0), call.parts[p].weight.rows / form.head_dim,
                                     x.size(1), form.head_dim);
        call.parts[p].out = TensorView(out).data();
        made[p] = std::move(out);
    }
    const py::gil_scoped_release unlocked;
    attention_inputs(engine, call);
    return made;
}

}  // namespace

void bind_attention_inputs(py::module_& module) {
    py::class_<AttentionForm>(module, "AttentionForm",
                              "How an attention computes; see csrc/bindings/attention_inputs.cpp.")
        .def(py::init([](std::array<py::object, 3> projections, std::array<bool, 3> packed,
                         std::optional<std::array<py::object, 2>> norms, bool norms_rows, bool half,
                         bool whole, bool heads_outside, int64_t head_dim) {
                 return AttentionForm{
                     std::move(projections), packed,  std::move(norms), norms_rows, half, whole,
                     heads_outside,          head_dim};
             }),
             py::kw_only(), py::arg("projections"), py::arg("packed"), py::arg("norms"),
             py::arg("norms_rows"), py::arg("half"), py::arg("whole"), py::arg("heads_outside"),
             py::arg("head_dim"))
        .def_readonly("heads_outside", &AttentionForm::heads_outside);
    module.def("attention_inputs", &attention_inputs_of, py::arg("engine"), py::arg("form"),
               py::arg("attention"), py::arg("hidden"), py::arg("cos"), py::arg("sin"),
               py::arg("most"), py::arg("most_of_bf16"),
               "(queries, keys, values) of [batch, tokens, columns], each [batch, heads, tokens, "
               "head_dim]. None, and nothing is done, for more tokens than the most, where a part "
               "of the attention has hooks or another class, and for tensors that are not rows of "
               "numbers of one type in RAM.");
}

}  // namespace moeinf
