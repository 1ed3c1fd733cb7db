#include "bindings/dlpack.h"

#include <array>
#include <utility>

#include "bindings/dlpack_abi.h"

namespace moeinf {
namespace {

DLDevice device_of(const Device* device) {
    if (device == nullptr || device->is_fake()) return {kHostDevice, 0};
    return {kCudaDevice, device->index()};
}

struct Export {
    DLManagedTensor managed;
    std::array<int64_t, 2> shape;
    std::array<int64_t, 2> strides;
    std::shared_ptr<const SlotPool> pool;
    bool holds = true;

    ~Export() {
        if (holds) pool->end_view();
    }
};

void end_export(DLManagedTensor* managed) {
    const std::unique_ptr<Export> ended(static_cast<Export*>(managed->manager_ctx));
}

void end_unclaimed(PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, kUnclaimed)) return;
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kUnclaimed));
    managed->deleter(managed);
}

}  // namespace

pybind11::capsule to_dlpack(std::shared_ptr<const SlotPool> pool, const Device* device,
                            bool holds) {
    const int32_t rows = pool->begin_view();
    auto exported = std::make_unique<Export>();
    exported->pool = pool;
    if (!holds) {
        pool->end_view();
        exported->holds = false;
    }
    const auto row_bytes = static_cast<int64_t>(pool->slot_bytes());
    exported->shape = {rows, row_bytes};
    exported->strides = {row_bytes, 1};
    exported->managed = {{pool->data(),
                          device_of(device),
                          2,
                          {kUnsignedInteger, 8, 1},
                          exported->shape.data(),
                          exported->strides.data(),
                          0},
                         exported.get(),
                         end_export};
    pybind11::capsule capsule(&exported->managed, kUnclaimed, end_unclaimed);
    (void)exported.release();  // the capsule, or who takes it over, ends it
    return capsule;
}

pybind11::tuple dlpack_device(const Device* device) {
    const DLDevice found = device_of(device);
    return pybind11::make_tuple(found.device_type, found.device_id);
}

}  // namespace moeinf
