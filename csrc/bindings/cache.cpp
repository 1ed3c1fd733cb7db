// The cache for Python. Ids go in as a sequence or an integer array, slots come out as places
// of the pool, which torch sees through DLPack. The GIL is released wherever a call may wait.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings/bindings.h"
#include "bindings/dlpack.h"
#include "bindings/ids.h"
#include "cache/expert_cache.h"
#include "policy/policy.h"
#include "tier/device_link.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace moeinf {
namespace {

// From a sequence of ints or an integer array. Not by pybind11's own conversion, which takes 0.3 us
// longer for 8 ids.
template <class Id>
std::vector<Id> read_ids(py::handle object) {
    const bool is_array = !PyList_CheckExact(object.ptr()) && PyObject_CheckBuffer(object.ptr());
    const py::object source =
        is_array ? object.attr("tolist")() : py::reinterpret_borrow<py::object>(object);
    const auto items = py::reinterpret_steal<py::object>(
        PySequence_Fast(source.ptr(), "expected a sequence of ints or an integer array"));
    if (!items) throw py::error_already_set();
    std::vector<Id> ids(static_cast<size_t>(PySequence_Fast_GET_SIZE(items.ptr())));
    PyObject** item = PySequence_Fast_ITEMS(items.ptr());
    for (Id& id : ids) {
        const long long value = PyLong_AsLongLong(*item++);
        if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
        id = Id(static_cast<int32_t>(value));
        if (number(id) != value) {
            throw Error(ErrorCode::kInvalid,
                        "an id must fit in 32 bits, found " + std::to_string(value));
        }
    }
    return ids;
}

// Lets Ctrl-C end a wait; called with no lock held, from threads that have released the GIL.
void check_signals() {
    const py::gil_scoped_acquire acquired;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::shared_ptr<ExpertCache> make_cache(std::shared_ptr<Catalog> catalog, int32_t slots,
                                        std::string policy, int32_t threads, size_t chunk_bytes,
                                        bool direct, std::string prefetch,
                                        std::shared_ptr<Device> device, int32_t host_slots,
                                        bool exclusive, size_t gather_below,
                                        std::optional<Eamc> eamc,
                                        std::shared_ptr<HostTier> host_tier, std::string shared) {
    ExpertCacheOptions options;
    options.slots = slots;
    options.policy = std::move(policy);
    options.prefetch = std::move(prefetch);
    options.copy = {threads, chunk_bytes, direct};
    options.poll = check_signals;
    options.device = std::move(device);
    options.host_tier = std::move(host_tier);
    options.host_slots = host_slots;
    options.shared = std::move(shared);
    options.exclusive = exclusive;
    options.gather_below = gather_below;
    if (eamc) options.eamc = std::make_shared<const Eamc>(*std::move(eamc));
    return std::make_shared<ExpertCache>(std::move(catalog), std::move(options));
}

py::list slots_of(const std::vector<ReadyExpert>& ready) {
    py::list slots(ready.size());
    for (size_t i = 0; i < ready.size(); ++i) {
        PyList_SET_ITEM(slots.ptr(), static_cast<Py_ssize_t>(i),
                        PyLong_FromLong(number(ready[i].slot)));
    }
    return slots;
}

// A step as Python holds it.
struct PythonLease {
    StepLease lease;
    std::vector<ReadyExpert> ready;  // of wait_all
};

PythonLease start(ExpertCache& cache, LayerId layer, py::handle experts, bool all_at_once) {
    const auto ids = read_ids<ExpertIndex>(experts);
    const py::gil_scoped_release released;
    PythonLease step{cache.begin_step({.layer = layer, .experts = ids, .all_at_once = all_at_once}),
                     {}};
    if (all_at_once) step.lease.acquire_all(step.ready);
    return step;
}

std::optional<std::vector<std::pair<int32_t, SlotId>>> wait_ready(PythonLease& step) {
    std::vector<ReadyExpert> ready;
    {
        const py::gil_scoped_release released;
        if (!step.lease.wait_ready(ready)) return std::nullopt;
    }
    std::vector<std::pair<int32_t, SlotId>> pairs;
    for (const ReadyExpert& one : ready) pairs.emplace_back(one.position, one.slot);
    return pairs;
}

py::dict to_dict(const LayerStats& stats) {
    return py::dict("accesses"_a = stats.accesses, "hits"_a = stats.hits, "misses"_a = stats.misses,
                    "evictions"_a = stats.evictions, "demand_bytes"_a = stats.demand_bytes,
                    "prefetch_bytes"_a = stats.prefetch_bytes,
                    "prefetch_useful_bytes"_a = stats.prefetch_useful_bytes,
                    "prefetch_wasted_bytes"_a = stats.prefetch_wasted_bytes,
                    "stall_seconds"_a = stats.stall_seconds);
}

const char* name_of(PrefetchTrial::State state) {
    switch (state) {
        case PrefetchTrial::State::kOff:
            return "off";
        case PrefetchTrial::State::kTrying:
            return "on trial";
        case PrefetchTrial::State::kOn:
            return "on";
    }
    return "";
}

py::dict to_dict(const PredictionStats& stats) {
    return py::dict(
        "predictor"_a = stats.predictor, "state"_a = name_of(stats.state), "gain"_a = stats.gain,
        "gain_error"_a = stats.gain_error, "switches"_a = stats.switches, "steps"_a = stats.steps,
        "active_steps"_a = stats.active_steps, "used"_a = stats.used,
        "predicted"_a = stats.predicted, "correct"_a = stats.correct,
        "predicted_absent"_a = stats.predicted_absent,
        "predicted_absent_used"_a = stats.predicted_absent_used, "fetched"_a = stats.fetched,
        "late"_a = stats.late, "late_seconds"_a = stats.late_seconds);
}

const Device* device_of(const ExpertCache& cache) {
    DeviceLink* const link = cache.device_link();
    return link == nullptr ? nullptr : link->device().get();
}

py::object host_stats(const ExpertCache& cache) {
    DeviceLink* const link = cache.device_link();
    if (link == nullptr) return py::none();
    const LinkStats copies = link->stats();
    py::dict row = to_dict(link->host().stats());
    row["demoted_bytes"] = copies.demoted_bytes;
    row["copied_bytes"] = copies.copied_bytes;
    row["copies"] = copies.copies;
    row["gathers"] = copies.gathers;
    return row;
}

py::capsule export_pool(const ExpertCache& cache, py::handle dl_device, py::handle copy) {
    const bool elsewhere =
        !dl_device.is_none() && !dl_device.equal(dlpack_device(device_of(cache)));
    if (elsewhere || (!copy.is_none() && py::cast<bool>(copy))) {
        throw py::buffer_error("the pool is exported in place: no copy and no other device");
    }
    return to_dlpack(cache.shared_pool(), device_of(cache), true);
}

void bind_lease(py::module_& module) {
    py::class_<PythonLease>(
        module, "StepLease",
        "The experts of one step. Their slots keep their bytes until release(); use it "
        "as a context manager.")
        .def("wait_ready", &wait_ready,
             "Waits for experts and returns those that became ready as [(position, slot)]; None "
             "once all have been handed out. Raises ReadError or CapacityError.")
        .def(
            "acquire_all",
            [](PythonLease& step) {
                {
                    const py::gil_scoped_release released;
                    step.ready.clear();
                    step.lease.acquire_all(step.ready);
                }
                return slots_of(step.ready);
            },
            "Waits for all and returns their slots in the order of `experts`.")
        .def(
            "release", [](PythonLease& step) { step.lease.release(); },
            "All slots of the step may be reused.")
        .def(
            "release", [](PythonLease& step, int32_t position) { step.lease.release(position); },
            py::arg("position"), "The slot of that position may be reused.")
        .def("__enter__", [](py::object self) { return self; })
        .def("__exit__",
             [](PythonLease& step, const py::args& /*error*/) { step.lease.release(); });
}

}  // namespace

void bind_cache(py::module_& module) {
    module.def("policy_names", &policy_names, "What `policy` may be.");
    module.def(
        "policy_parameters",
        [](const std::string& policy) {
            py::dict parameters;
            for (const PolicyParameter& one : policy_parameters(policy)) {
                parameters[py::str(std::string(one.name))] =
                    py::make_tuple(one.usual, one.least, one.greatest);
            }
            return parameters;
        },
        py::arg("policy"),
        "name: (usual value, least, greatest), for `policy=\"NAME:name=value\"`.");
    module.def("prefetch_names", &prefetch_names, "What `prefetch` may be.");
    bind_lease(module);
    py::class_<ExpertCache, std::shared_ptr<ExpertCache>>(
        module, "ExpertCache", "Experts in the slots of one pool, filled from files. Thread-safe.",
        py::release_gil_before_calling_cpp_dtor())
        .def(py::init(&make_cache), py::arg("catalog"), py::arg("slots"),
             py::arg("policy") = "learned", py::kw_only(), py::arg("threads") = 0,
             py::arg("chunk_bytes") = 0, py::arg("direct") = true, py::arg("prefetch") = "off",
             py::arg("device") = py::none(), py::arg("host_slots") = 0,
             py::arg("exclusive") = false, py::arg("gather_below") = 0,
             py::arg("eamc") = py::none(), py::arg("host_tier") = py::none(),
             py::arg("shared") = "", py::call_guard<py::gil_scoped_release>())
        .def(
            "begin_step",
            [](ExpertCache& cache, LayerId layer, py::handle experts) {
                return start(cache, layer, experts, false);
            },
            py::arg("layer"), py::arg("experts"),
            "Starts a step and never waits. experts: distinct ids within "
            "the layer. What slots cannot hold passes through two staging slots.")
        .def(
            "acquire",
            [](ExpertCache& cache, LayerId layer, py::handle experts) {
                PythonLease step = start(cache, layer, experts, true);
                py::list slots = slots_of(step.ready);
                return std::make_pair(std::move(step), std::move(slots));
            },
            py::arg("layer"), py::arg("experts"),
            "Starts a step, waits until all its experts sit in slots at once, and returns the "
            "lease and their slots in the order of `experts`. Raises CapacityError where they "
            "cannot.")
        .def(
            "prefetch",
            [](ExpertCache& cache, LayerId layer, py::handle experts) {
                const auto ids = read_ids<ExpertIndex>(experts);
                const py::gil_scoped_release released;
                return cache.prefetch(layer, ids);
            },
            py::arg("layer"), py::arg("experts"),
            "Starts reading what is absent, best first. Returns the number of reads started.")
        .def(
            "predict",
            [](ExpertCache& cache, LayerId layer, py::handle experts) {
                const auto ids = read_ids<ExpertIndex>(experts);
                const py::gil_scoped_release released;
                cache.predict(layer, ids);
            },
            py::arg("layer"), py::arg("experts"),
            "What the next step of that layer is expected to use, best first. Read ahead within "
            "the budget, where that pays.")
        .def_property_readonly("wants_predictions", &ExpertCache::wants_predictions,
                               "Is a call of predict() worth making now?")
        .def(
            "prediction_stats",
            [](const ExpertCache& cache) { return to_dict(cache.prediction_stats()); },
            "Counts of predictions; see PredictionStats in csrc/prefetch/prefetcher.h.")
        .def("resize", &ExpertCache::resize, py::arg("slots"),
             py::call_guard<py::gil_scoped_release>(),
             "Waits for leases on slots that go. Views of them may not be touched any more; "
             "after growing, take a new view to see the new slots.")
        .def(
            "stats",
            [](const ExpertCache& cache) {
                py::list rows;
                for (const LayerStats& stats : cache.stats()) rows.append(to_dict(stats));
                return rows;
            },
            "One dict per layer.")
        .def(
            "set_priors",
            [](ExpertCache& cache, const py::array_t<float, py::array::c_style>& priors) {
                cache.set_priors({priors.data(), static_cast<size_t>(priors.size())});
            },
            py::arg("priors").noconvert(), "How likely each expert is to come, by flat id.")
        .def("eamc", &ExpertCache::eamc, py::call_guard<py::gil_scoped_release>(),
             "A copy of what 'eam' has collected, the request in progress as it is included.")
        .def(
            "wait_for_slots",
            [](ExpertCache& cache, const std::vector<SlotId>& slots) {
                DeviceLink* const link = cache.device_link();
                if (link == nullptr) return;
                for (const SlotId slot : slots) {
                    while (!link->fences().arrived(slot)) {
                        std::this_thread::sleep_for(std::chrono::microseconds(20));
                        check_signals();
                    }
                }
            },
            py::arg("slots"), py::call_guard<py::gil_scoped_release>(),
            "The host waits until the bytes of leased slots are there; at once where slots lie in "
            "RAM.")
        .def("host_stats", &host_stats,
             "Counts of the pinned RAM and of the link to the device; None where slots lie in RAM.")
        .def("reset_stats", &ExpertCache::reset_stats)
        .def("resident", &ExpertCache::resident, py::arg("layer"),
             "Ids within the layer whose bytes are in slots.")
        .def_property_readonly("slots", &ExpertCache::slots)
        .def_property_readonly("policy", &ExpertCache::policy)
        .def_property_readonly(
            "files_direct",
            [](const ExpertCache& cache) {
                std::vector<bool> direct;
                const size_t files = cache.catalog().files().size();
                for (uint32_t file = 0; file < files; ++file) {
                    direct.push_back(cache.files().file_is_direct(file));
                }
                return direct;
            },
            "For each file of the catalog: is it read with O_DIRECT?")
        .def(
            "places",
            [](const ExpertCache& cache) {
                py::list rows;
                for (const PlaceStats& place : cache.files().places()) {
                    rows.append(py::dict("read_bytes"_a = place.read_bytes,
                                         "bytes_per_second"_a = place.bytes_per_second,
                                         "failure"_a = place.failure));
                }
                return rows;
            },
            "What was read from the files themselves, then from each place of copies.")
        .def_property_readonly("slot_bytes",
                               [](const ExpertCache& cache) { return cache.pool().slot_bytes(); })
        .def_property_readonly(
            "address",
            [](const ExpertCache& cache) {
                return reinterpret_cast<uintptr_t>(cache.pool().data());
            },
            "Of slot 0. The same for the life of the cache.")
        .def_property_readonly_static(
            "staging_slots", [](const py::object&) { return ExpertCache::kStagingSlots; },
            "Slots of the pool beside those that hold residents.")
        .def(
            "__dlpack__",
            [](const ExpertCache& cache, py::handle /*stream*/, py::handle /*max_version*/,
               py::handle dl_device,
               py::handle copy) { return export_pool(cache, dl_device, copy); },
            py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
            py::arg("dl_device") = py::none(), py::arg("copy") = py::none(),
            "uint8 [staging_slots + slots, slot_bytes], not copied; slot numbers are those that "
            "leases give. Keeps the memory, not the cache, alive: also of slots that go.")
        .def(
            "leased_rows",
            [](const ExpertCache& cache) {
                return to_dlpack(cache.shared_pool(), device_of(cache), false);
            },
            "The same for who reads leased slots alone: keeps no memory of slots that go.")
        .def("__dlpack_device__",
             [](const ExpertCache& cache) { return dlpack_device(device_of(cache)); });
}

}  // namespace moeinf
