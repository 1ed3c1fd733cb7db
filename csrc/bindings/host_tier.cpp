// The RAM tier that several caches share, for Python.
#include "tier/host_tier.h"

#include <memory>
#include <string>
#include <utility>

#include "bindings/bindings.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace moeinf {
namespace {

std::shared_ptr<HostTier> make_tier(std::shared_ptr<Catalog> catalog,
                                    const std::shared_ptr<Device>& device, int32_t slots,
                                    std::string policy, bool exclusive, int32_t threads,
                                    size_t chunk_bytes, bool direct) {
    return HostTier::make(std::move(catalog), *device,
                          {.slots = slots,
                           .policy = std::move(policy),
                           .exclusive = exclusive,
                           .read = {threads, chunk_bytes, direct},
                           .eamc = nullptr});
}

}  // namespace

py::dict to_dict(const HostTierStats& stats) {
    return py::dict("slots"_a = stats.slots, "slots_refused"_a = stats.slots_refused,
                    "hits"_a = stats.hits, "misses"_a = stats.misses,
                    "read_bytes"_a = stats.read_bytes, "demoted"_a = stats.demoted);
}

void bind_host_tier(py::module_& module) {
    py::class_<HostTier, std::shared_ptr<HostTier>>(
        module, "HostTier",
        "Experts in page-locked RAM, read from files, for the caches of one or several devices.",
        py::release_gil_before_calling_cpp_dtor())
        .def(py::init(&make_tier), py::arg("catalog"), py::arg("device"), py::arg("slots"),
             py::arg("policy") = "learned", py::kw_only(), py::arg("exclusive") = false,
             py::arg("threads") = 0, py::arg("chunk_bytes") = 0, py::arg("direct") = true,
             py::call_guard<py::gil_scoped_release>())
        .def("stats", [](const HostTier& tier) { return to_dict(tier.stats()); })
        .def("reset_stats", &HostTier::reset_stats);
}

}  // namespace moeinf
