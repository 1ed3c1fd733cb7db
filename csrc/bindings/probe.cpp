// Measuring instruments for Python: the disk and the cache itself.
#include <pybind11/stl.h>

#include <string>

#include "bindings/bindings.h"
#include "bindings/ids.h"
#include "probe/cache_timing.h"
#include "probe/file_read.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace moeinf {
void bind_probe(py::module_& module) {
    module.def(
        "read_bandwidth",
        [](const std::string& path, double seconds) {
            ReadBandwidth found;
            {
                const py::gil_scoped_release released;
                found = read_bandwidth(path, seconds);
            }
            py::list ways;
            for (const ReadWay& way : found.ways) {
                ways.append(py::dict("request_bytes"_a = way.request_bytes,
                                     "in_flight"_a = way.in_flight,
                                     "bytes_per_second"_a = way.bytes_per_second));
            }
            return py::dict("path"_a = found.path, "direct"_a = found.direct,
                            "bytes_per_second"_a = found.ways.front().bytes_per_second,
                            "ways"_a = ways);
        },
        py::arg("path"), py::arg("seconds") = 1.0,
        "Sequential read rates of a file, or of a folder's largest file: path, direct, "
        "bytes_per_second (the best) and ways (request_bytes, in_flight, bytes_per_second each).");
    module.def("time_cache_hits", &time_cache_hits, py::arg("cache"), py::arg("layer"),
               py::arg("experts"), py::arg("rounds"), py::arg("steps_per_round"),
               py::call_guard<py::gil_scoped_release>(),
               "Seconds of a step of resident experts without Python, a mean per round.");
    module.def("time_cache_misses", &time_cache_misses, py::arg("policy"), py::arg("num_layers"),
               py::arg("num_experts"), py::arg("slots"), py::arg("misses"), py::arg("rounds"),
               py::arg("steps_per_round"), py::call_guard<py::gil_scoped_release>(),
               "Seconds to plan a step whose experts all miss, no bytes moved, a mean per round.");
}

}  // namespace moeinf
