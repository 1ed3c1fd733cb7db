#include "bindings/tensor_view.h"

namespace py = pybind11;

namespace moeinf {
namespace {

// Of the type of the latest tensor: nearly all are of one type. Guarded by the interpreter's lock.
const DLPackExchange* exchange_of(PyTypeObject* type) {
    static PyTypeObject* known = nullptr;
    static const DLPackExchange* exchange = nullptr;
    if (type == known) return exchange;
    const py::object capsule =
        py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
    exchange = nullptr;
    if (PyCapsule_CheckExact(capsule.ptr())) {
        exchange = static_cast<const DLPackExchange*>(
            PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (exchange == nullptr) throw py::error_already_set();
        while (exchange != nullptr && exchange->version.major != 1) exchange = exchange->older;
        if (exchange != nullptr && exchange->tensor_from_object == nullptr) exchange = nullptr;
    }
    known = type;
    return exchange;
}

}  // namespace

TensorView::TensorView(py::handle tensor) {
    if (const DLPackExchange* exchange = exchange_of(Py_TYPE(tensor.ptr()))) {
        if (exchange->tensor_from_object(tensor.ptr(), &tensor_) == 0) return;
        PyErr_Clear();
        tensor_ = {};
        return;
    }
    try {  // torch before 2.10
        owner_ = tensor.attr("detach")().attr("__dlpack__")();
    } catch (const py::error_already_set&) {
        return;
    }
    const void* managed = PyCapsule_GetPointer(owner_.ptr(), kUnclaimed);
    if (managed == nullptr) throw py::error_already_set();
    tensor_ = static_cast<const DLManagedTensor*>(managed)->dl_tensor;
}

bool TensorView::is_plain_matrix(int64_t columns) const noexcept {
    if (tensor_.ndim != 2 || tensor_.device.device_type != kHostDevice) return false;
    const int64_t* shape = tensor_.shape;
    const int64_t* strides = tensor_.strides;
    if (columns >= 0 && shape[1] != columns) return false;
    if (strides == nullptr || shape[0] == 0 || shape[1] == 0) return true;
    return (strides[1] == 1 || shape[1] == 1) && (strides[0] == shape[1] || shape[0] == 1);
}

std::optional<DType> TensorView::floats() const noexcept {
    const DLDataType type = tensor_.dtype;
    if (type.lanes != 1) return std::nullopt;
    if (type.code == kBrainFloat && type.bits == 16) return DType::kBF16;
    if (type.code == kFloat && type.bits == 16) return DType::kF16;
    if (type.code == kFloat && type.bits == 32) return DType::kF32;
    return std::nullopt;
}

std::optional<bool> TensorView::ints_of_64() const noexcept {
    const DLDataType type = tensor_.dtype;
    if (type.code != kSignedInteger || (type.bits != 32 && type.bits != 64)) return std::nullopt;
    return type.bits == 64;
}

void* TensorView::data() const noexcept {
    return static_cast<std::byte*>(tensor_.data) + tensor_.byte_offset;
}

}  // namespace moeinf
