// A CUDA device, and the steps of one of its streams.
#include "cuda/cuda.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>

#include "base/error.h"
#include "bindings/bindings.h"
#include "bindings/ids.h"
#include "cache/stream_step.h"
#include "device/device.h"
#include "probe/copy_timing.h"

namespace py = pybind11;

namespace moeinf {
namespace {

template <typename Id>
py::array ids_as(const StepStream& stream) {
    const RoutedStep& step = stream.step();
    py::array_t<Id> ids({step.tokens, static_cast<int64_t>(step.top_k)});
    std::memcpy(ids.mutable_data(), stream.ids(), static_cast<size_t>(ids.nbytes()));
    return ids;
}

py::array ids_of(const StepStream& stream) {
    if (stream.ids() == nullptr) throw Error(ErrorCode::kInvalid, "no step has begun");
    return stream.step().ids_are_int64 ? ids_as<int64_t>(stream) : ids_as<int32_t>(stream);
}

}  // namespace

void bind_device(py::module_& module) {
    py::class_<Device, std::shared_ptr<Device>>(
        module, "CudaDevice", "A CUDA device, through the driver library found at run time.")
        .def(py::init([](int32_t index) { return open_cuda_device(index); }), py::arg("index") = 0,
             "Raises UnsupportedError, saying what is missing, or ValueError for a bad index.")
        .def_property_readonly("name", &Device::name)
        .def_property_readonly("index", &Device::index)
        .def_property_readonly("driver_version", &Device::driver_version, "13010: CUDA 13.1.")
        .def("time_copies", &time_copies, py::arg("nbytes"), py::arg("count"), py::arg("gather"),
             py::arg("rounds"), py::call_guard<py::gil_scoped_release>(),
             "Seconds for `count` runs of `nbytes` from pinned RAM, the best of `rounds`.")
        .def_property_readonly("is_fake", &Device::is_fake, "A driver made for tests.")
        .def_property_readonly("can_gather", &Device::can_gather,
                               "Was the gather kernel built, and does it run on this device?")
        .def_property_readonly("free_bytes", &Device::free_bytes)
        .def_property_readonly("total_bytes", &Device::total_bytes);
}

void bind_step_stream(py::module_& module) {
    py::class_<Wave>(module, "Wave", "The experts of a step that can be computed now.")
        .def_readonly("whole", &Wave::whole, "Are they all experts of the step?")
        .def_readonly("names_past_the_end", &Wave::names_past_the_end,
                      "Is num_experts, which means no expert, among the ids?")
        .def_readonly("slots", &Wave::slots, "Experts that the cache can hold now.");

    const auto released = py::call_guard<py::gil_scoped_release>();
    py::class_<StepStream>(module, "StepStream",
                           "Steps of one stream of a device; see csrc/cache/stream_step.h. Not "
                           "thread-safe.",
                           py::release_gil_before_calling_cpp_dtor())
        .def(py::init([](std::shared_ptr<ExpertCache> cache, uintptr_t stream) {
                 return std::make_unique<StepStream>(std::move(cache),
                                                     reinterpret_cast<Stream>(stream));
             }),
             py::arg("cache"), py::arg("stream"))
        .def(
            "copy_ids",
            [](StepStream& stream, LayerId layer, uintptr_t ids, bool ids_are_int64, int64_t tokens,
               int32_t top_k, uintptr_t map, bool prefill, bool new_sequence, int64_t caller) {
                stream.copy_ids({.layer = layer,
                                 .ids = reinterpret_cast<const std::byte*>(ids),
                                 .ids_are_int64 = ids_are_int64,
                                 .tokens = tokens,
                                 .top_k = top_k,
                                 .map = reinterpret_cast<std::byte*>(map),
                                 .prefill = prefill,
                                 .new_sequence = new_sequence,
                                 .caller = caller});
            },
            py::arg("layer"), py::arg("ids_address"), py::arg("ids_are_int64"), py::arg("tokens"),
            py::arg("top_k"), py::arg("map_address"), py::arg("prefill"), py::arg("new_sequence"),
            py::arg("caller"), released,
            "Enqueues the way of the ids [tokens, top_k] from a device address to the host. The "
            "map is int32 [num_experts + 1] on the device.")
        .def("begin", &StepStream::begin, released,
             "Waits for the ids, starts the step and returns its first wave, or None where no id "
             "names an expert. In the stream's order the map will hold the slots of the wave, -1 "
             "elsewhere, and the stream waits for their bytes.")
        .def("next", &StepStream::next, released,
             "The next wave, or None at the end of the step. Slots of the wave before may be "
             "reused behind what the stream has been given so far.")
        .def("release", &StepStream::release, released, "Ends the step early.")
        .def("synchronize", &StepStream::synchronize, released, "The host waits for the stream.")
        .def("ids", &ids_of, "The ids of the step, a copy.");
}

}  // namespace moeinf
