// A slot pool in RAM for Python: enough to test and measure transfers without a cache.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "base/error.h"
#include "bindings/bindings.h"
#include "bindings/ids.h"
#include "memory/arena.h"
#include "memory/slot_pool.h"

namespace py = pybind11;

namespace moeinf {
namespace {

std::shared_ptr<SlotPool> make_pool(uint64_t slot_bytes, int32_t slots,
                                    std::optional<int32_t> capacity) {
    const int32_t most = capacity.value_or(slots);
    if (most <= 0 || slot_bytes == 0 || slot_bytes > UINT64_MAX / static_cast<uint64_t>(most)) {
        throw Error(ErrorCode::kInvalid, "expected at least one slot of at least one byte, found " +
                                             std::to_string(most) + " of " +
                                             std::to_string(slot_bytes));
    }
    return std::make_shared<SlotPool>(make_host_arena(slot_bytes * static_cast<uint64_t>(most)),
                                      slot_bytes, most, slots);
}

}  // namespace

void bind_pool(py::module_& module) {
    py::class_<SlotPool, std::shared_ptr<SlotPool>>(
        module, "SlotPool", "Equal slots in one range of RAM; their address never changes.")
        .def(py::init(&make_pool), py::arg("slot_bytes"), py::arg("slots"), py::kw_only(),
             py::arg("capacity") = py::none())
        .def_property_readonly("slot_bytes", &SlotPool::slot_bytes)
        .def_property_readonly("slots", &SlotPool::slots)
        .def_property_readonly("capacity", &SlotPool::capacity)
        .def("resize", &SlotPool::resize, py::arg("slots"),
             py::call_guard<py::gil_scoped_release>())
        .def(
            "numpy",
            [](const std::shared_ptr<SlotPool>& pool, SlotId slot) {
                if (!is_some(slot) || number(slot) >= pool->slots()) {
                    throw py::index_error("slot " + std::to_string(number(slot)) + " of " +
                                          std::to_string(pool->slots()));
                }
                return py::array_t<uint8_t>({static_cast<py::ssize_t>(pool->slot_bytes())}, {1},
                                            reinterpret_cast<uint8_t*>(pool->slot(slot)),
                                            py::cast(pool));
            },
            py::arg("slot"), "The bytes of one slot, uint8 [slot_bytes], not copied.");
}

}  // namespace moeinf
