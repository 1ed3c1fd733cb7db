#include "bindings/tensor_view.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "base/sizes.h"

namespace py = pybind11;

namespace moeinf {
namespace {

const DLPackExchange* find_exchange(PyTypeObject* type) {
    const py::object capsule =
        py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_CheckExact(capsule.ptr())) return nullptr;
    const auto* exchange = static_cast<const DLPackExchange*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (exchange == nullptr) throw py::error_already_set();
    while (exchange != nullptr && exchange->version.major != 1) exchange = exchange->older;
    if (exchange == nullptr || exchange->tensor_from_object == nullptr ||
        exchange->owned_to_object == nullptr) {
        return nullptr;
    }
    return exchange;
}

// Of the two types of the latest tensors: nearly all are tensors or parameters. Guarded by the
// interpreter's lock.
const DLPackExchange* exchange_of(PyTypeObject* type) {
    struct Known {
        PyTypeObject* type;
        const DLPackExchange* exchange;
    };
    static Known latest{};
    static Known other{};
    if (type != latest.type) {
        std::swap(latest, other);
        if (type != latest.type) latest = {type, find_exchange(type)};
    }
    return latest.exchange;
}

constexpr int kMostDimensions = 8;
constexpr size_t kAlign = 64;

// A tensor's description, and its elements behind it, in one piece of memory.
struct alignas(kAlign) NewTensor {
    DLManagedTensorVersioned managed{};
    std::array<int64_t, kMostDimensions> shape{};
    std::array<int64_t, kMostDimensions> strides{};
};

void end_new(DLManagedTensorVersioned* managed) {
    std::free(managed->manager_ctx);
}

}  // namespace

TensorView::TensorView(py::handle tensor)
    : object_(tensor), exchange_(exchange_of(Py_TYPE(tensor.ptr()))) {
    if (exchange_ != nullptr) {
        if (exchange_->tensor_from_object(tensor.ptr(), &tensor_) == 0) return;
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

bool TensorView::is_plain_vector() const noexcept {
    return tensor_.ndim == 1 && tensor_.device.device_type == kHostDevice &&
           (tensor_.strides == nullptr || tensor_.strides[0] == 1 || tensor_.shape[0] <= 1);
}

std::optional<TensorView::Rows> TensorView::as_rows() const noexcept {
    if (tensor_.ndim < 1 || tensor_.device.device_type != kHostDevice) return std::nullopt;
    const int last = tensor_.ndim - 1;
    const int64_t columns = tensor_.shape[last];
    Rows rows{1, columns, columns};
    if (tensor_.strides != nullptr && tensor_.strides[last] != 1 && columns > 1) {
        return std::nullopt;
    }
    for (int d = last - 1; d >= 0; --d) {
        const int64_t size = tensor_.shape[d];
        if (size != 1 && tensor_.strides != nullptr) {
            const int64_t stride = tensor_.strides[d];
            if (rows.count == 1) rows.stride = stride;
            if (stride != rows.count * rows.stride || stride < columns) return std::nullopt;
        }
        rows.count *= size;
    }
    return rows;
}

py::object TensorView::new_rows(int64_t columns) const {
    if (exchange_ == nullptr || tensor_.ndim > kMostDimensions) {
        py::tuple shape(tensor_.ndim);
        for (int d = 0; d < tensor_.ndim; ++d) {
            shape[static_cast<size_t>(d)] = d + 1 < tensor_.ndim ? tensor_.shape[d] : columns;
        }
        return object_.attr("new_empty")(shape);
    }
    int64_t shape[kMostDimensions];
    int64_t strides[kMostDimensions];
    int64_t count = 1;
    for (int d = tensor_.ndim - 1; d >= 0; --d) {
        shape[d] = d + 1 < tensor_.ndim ? tensor_.shape[d] : columns;
        strides[d] = count;
        count *= shape[d];
    }
    return make(tensor_.ndim, shape, strides, count, tensor_.dtype);
}

py::object TensorView::new_ids(int64_t columns) const {
    const int64_t shape[] = {tensor_.shape[0], columns};
    const int64_t strides[] = {columns, 1};
    return make(2, shape, strides, shape[0] * columns, {kSignedInteger, 64, 1});
}

py::object TensorView::new_heads(int64_t batch, int64_t heads, int64_t tokens,
                                 int64_t head_dim) const {
    const int64_t row = heads * head_dim;
    const int64_t shape[] = {batch, heads, tokens, head_dim};
    const int64_t strides[] = {tokens * row, head_dim, row, 1};
    return make(4, shape, strides, batch * tokens * row, tensor_.dtype);
}

py::object TensorView::make(int dimensions, const int64_t* shape, const int64_t* strides,
                            int64_t count, DLDataType type) const {
    const size_t nbytes = type.bits / 8u * static_cast<size_t>(count);
    void* memory = std::aligned_alloc(kAlign, sizeof(NewTensor) + round_up(nbytes, kAlign));
    if (memory == nullptr) throw std::bad_alloc();
    auto* made = new (memory) NewTensor;
    std::copy_n(shape, dimensions, made->shape.begin());
    std::copy_n(strides, dimensions, made->strides.begin());
    made->managed = {{1, 1}, memory, end_new, 0, tensor_};
    DLTensor& to = made->managed.dl_tensor;
    to.data = made + 1;
    to.dtype = type;
    to.ndim = dimensions;
    to.byte_offset = 0;
    to.shape = made->shape.data();
    to.strides = made->strides.data();
    void* object = nullptr;
    if (exchange_->owned_to_object(&made->managed, &object) != 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

bool TensorView::bytes() const noexcept {
    return tensor_.dtype.code == kUnsignedInteger && tensor_.dtype.bits == 8 &&
           tensor_.dtype.lanes == 1;
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
