// Activation matrices and their collections for Python.
#include "policy/eam.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/ids.h"

namespace py = pybind11;

namespace moeinf {

void bind_eam(py::module_& module) {
    using namespace py::literals;
    py::class_<EamCollection>(module, "EamCollection",
                              "Activation matrices of finished requests; see csrc/policy/eam.h.")
        .def(py::init([](int32_t num_layers, int32_t num_experts, int32_t capacity) {
                 return EamCollection({num_layers, num_experts}, capacity);
             }),
             "num_layers"_a, "num_experts"_a, "capacity"_a)
        .def(
            "add",
            [](EamCollection& self, const Array<float>& matrix) { self.add(values(matrix)); },
            "matrix"_a)
        .def("__len__", &EamCollection::size)
        .def_property_readonly("capacity", &EamCollection::capacity)
        .def_property_readonly(
            "shape",
            [](const EamCollection& self) {
                return std::make_pair(self.shape().num_layers, self.shape().num_experts);
            },
            "Layers, and experts per layer.")
        .def("entries",
             [](const EamCollection& self) {
                 const ModelShape shape = self.shape();
                 py::array_t<float> out({self.size(), shape.num_layers, shape.num_experts});
                 for (int32_t i = 0; i < self.size(); ++i) {
                     const auto entry = self.entry(i);
                     std::copy(entry.begin(), entry.end(),
                               out.mutable_data() + static_cast<size_t>(i) * entry.size());
                 }
                 return out;
             })
        .def("predict", [](const EamCollection& self, const std::vector<int32_t>& matched) {
            const ModelShape shape = self.shape();
            for (const int32_t index : matched) {
                if (index < 0 || index >= self.size()) throw py::index_error();
            }
            py::array_t<float> out({shape.num_layers, shape.num_experts});
            predict_activations(self, matched,
                                {out.mutable_data(), static_cast<size_t>(out.size())});
            return out;
        });
    py::class_<Eamc> eamc(module, "Eamc", "Two collections: of prompts, and of decoding.");
    eamc.attr("PAPER_CAPACITY") = Eamc::kPaperCapacity;
    eamc.def(py::init<EamCollection, EamCollection>(), "prefill"_a, "decode"_a)
        .def_readonly("prefill", &Eamc::prefill)
        .def_readonly("decode", &Eamc::decode);
    py::class_<EamMatch>(module, "EamMatch", "A growing matrix against a collection.")
        .def(py::init<const EamCollection&>(), "collection"_a, py::keep_alive<1, 2>())
        .def("restart", &EamMatch::restart)
        .def(
            "add_row",
            [](EamMatch& self, LayerId layer, const std::vector<ExpertId>& experts,
               const Array<int32_t>& counts) { self.add_row(layer, experts, values(counts)); },
            "layer"_a, "experts"_a, "counts"_a)
        .def(
            "nearest",
            [](EamMatch& self, int32_t count) {
                std::vector<int32_t> out;
                self.nearest(count, out);
                return out;
            },
            "count"_a);
}

}  // namespace moeinf
