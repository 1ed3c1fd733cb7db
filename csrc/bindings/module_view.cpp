#include "bindings/module_view.h"

#include <array>
#include <unordered_map>
#include <utility>

namespace py = pybind11;

namespace moeinf {
namespace {

// Interned, so that a look-up compares pointers. By the address of a literal; never freed.
PyObject* name_of(const char* name) {
    static auto* names = new std::unordered_map<const char*, PyObject*>;
    PyObject*& known = (*names)[name];
    if (known == nullptr) known = PyUnicode_InternFromString(name);
    if (known == nullptr) throw py::error_already_set();
    return known;
}

py::handle found_in(py::handle dict, py::handle name) {
    if (!dict || !PyDict_Check(dict.ptr())) return {};
    PyObject* found = PyDict_GetItemWithError(dict.ptr(), name.ptr());
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return found;
}

py::handle found_in(py::handle dict, const char* name) {
    return found_in(dict, py::handle(name_of(name)));
}

bool is_empty(py::handle dict) {
    return dict && PyDict_Check(dict.ptr()) && PyDict_GET_SIZE(dict.ptr()) == 0;
}

bool is_plain_tensor(py::handle object) {
    static const auto* types =
        new std::array<py::object, 2>{py::module_::import("torch").attr("Tensor"),
                                      py::module_::import("torch").attr("nn").attr("Parameter")};
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    return type == (*types)[0].ptr() || type == (*types)[1].ptr();
}

}  // namespace

ModuleView::ModuleView(py::handle module) : module_(module) {
    if (!module || module.is_none()) return;
    members_ = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
    if (!members_) throw py::error_already_set();
}

ModuleView ModuleView::child(const char* name) const {
    return ModuleView(member("_modules", name));
}

bool ModuleView::runs(py::handle type) const {
    return module_ && reinterpret_cast<PyObject*>(Py_TYPE(module_.ptr())) == type.ptr() &&
           !found_in(members_, "forward") && is_empty(found_in(members_, "_forward_hooks")) &&
           is_empty(found_in(members_, "_forward_pre_hooks"));
}

py::handle ModuleView::attribute(const char* name) const {
    return found_in(members_, name);
}

py::handle ModuleView::attribute(py::handle name) const {
    return found_in(members_, name);
}

py::handle ModuleView::parameter(const char* name) const {
    return member("_parameters", name);
}

py::handle ModuleView::buffer(const char* name) const {
    return member("_buffers", name);
}

py::handle ModuleView::member(const char* group, const char* name) const {
    return found_in(found_in(members_, group), name);
}

std::optional<LinearPart> part_of(const ModuleView& layer, bool packed, const LinearCall& call) {
    py::handle bias = layer.parameter("bias");
    if (!bias) return std::nullopt;
    if (!bias.is_none() && !is_plain_tensor(bias)) return std::nullopt;
    const py::handle weight = packed ? layer.buffer("packed") : layer.parameter("weight");
    if (!weight || !is_plain_tensor(weight)) return std::nullopt;
    if (!packed) return plain_part(call, TensorView(weight), bias);
    const py::handle form = layer.attribute("form");
    if (!form) return std::nullopt;
    const py::object core = py::getattr(form, py::handle(name_of("core")));
    return packed_part(call, core.cast<const LinearWeight&>(), TensorView(weight), bias);
}

std::optional<NormView> norm_of(const ModuleView& norm) {
    const py::handle how = norm.attribute("moeinf_norm");
    const py::handle weight = norm.parameter("weight");
    if (!how || !weight || !is_plain_tensor(weight)) return std::nullopt;
    const auto [name, kind] = how.cast<std::pair<py::object, std::pair<float, bool>>>();
    const py::handle epsilon = norm.attribute(name);
    if (!epsilon || !PyFloat_CheckExact(epsilon.ptr())) return std::nullopt;
    NormView view{{static_cast<float>(PyFloat_AS_DOUBLE(epsilon.ptr())), kind.first, kind.second},
                  TensorView(weight)};
    if (!view.weight.is_plain_vector()) return std::nullopt;
    return view;
}

}  // namespace moeinf
