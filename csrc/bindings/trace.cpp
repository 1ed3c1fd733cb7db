// moeinf._core.simulate: a trace as NumPy arrays in, counts per layer out.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "base/error.h"
#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/ids.h"
#include "bindings/python_policy.h"
#include "policy/eam.h"
#include "trace/belady.h"
#include "trace/simulator.h"

namespace py = pybind11;

namespace moeinf {
namespace {

TraceView view(const Array<int16_t>& experts, const Array<int32_t>& sequence,
               const Array<uint8_t>& phase, const std::optional<Array<uint16_t>>& router,
               int32_t num_experts) {
    if (experts.ndim() != 3) {
        throw Error(ErrorCode::kInvalid,
                    "tensor 'experts': expected 3 dimensions [tokens, layers, k], found " +
                        std::to_string(experts.ndim()));
    }
    TraceView trace;
    trace.tokens = experts.shape(0);
    trace.layers = static_cast<int32_t>(experts.shape(1));
    trace.k = static_cast<int32_t>(experts.shape(2));
    trace.num_experts = num_experts;
    trace.experts = values(experts);
    trace.sequence = values(sequence);
    trace.phase = values(phase);
    if (router) trace.router = values(*router);
    return trace;
}

std::unique_ptr<Policy> policy_for(const TraceView& trace, const py::object& policy,
                                   const std::optional<Eamc>& eamc) {
    if (!py::isinstance<py::str>(policy)) return make_python_policy(policy);
    const auto name = policy.cast<std::string>();
    py::gil_scoped_release release;
    if (eamc) {
        if (name == "belady" || !policy_collects(name)) {
            throw Error(ErrorCode::kInvalid,
                        "a collection is for the policy 'eam', found policy='" + name + "'");
        }
        check_shape(*eamc, trace.shape(), "the trace");
    }
    if (name == "belady") return make_belady(trace);
    return make_policy(name, trace.shape(), eamc ? &*eamc : nullptr);
}

// Calls `priors(first_token, end_token)` after every pass: float32 [all experts] or None.
std::function<void(int64_t, int64_t, Policy&)> priors_hook(const py::object& priors,
                                                           ModelShape shape) {
    if (priors.is_none()) return {};
    return [&priors, shape](int64_t first, int64_t end, Policy& policy) {
        py::gil_scoped_acquire gil;
        const py::object answer = priors(first, end);
        if (answer.is_none()) return;
        const auto array = Array<float>(answer);
        if (array.size() != shape.total()) {
            throw Error(ErrorCode::kInvalid, "priors: expected " + std::to_string(shape.total()) +
                                                 " values, found " + std::to_string(array.size()));
        }
        policy.set_priors(values(array));
    };
}

py::dict simulate_arrays(const Array<int16_t>& experts, const Array<int32_t>& sequence,
                         const Array<uint8_t>& phase, const std::optional<Array<uint16_t>>& router,
                         int32_t num_experts, const py::object& policy, int32_t slots,
                         const std::optional<Eamc>& eamc, const py::object& priors,
                         const py::object& progress, bool step_misses) {
    const TraceView trace = view(experts, sequence, phase, router, num_experts);
    SimulationHooks hooks;
    hooks.after_pass = priors_hook(priors, trace.shape());
    if (!progress.is_none()) {
        hooks.progress = [&progress](int64_t tokens) {
            py::gil_scoped_acquire gil;
            progress(tokens);
        };
    }
    std::vector<uint16_t> misses;
    if (step_misses) hooks.step_misses = &misses;

    std::unique_ptr<Policy> chosen = policy_for(trace, policy, eamc);
    PerLayer<LayerCounts> layers;
    {
        py::gil_scoped_release release;
        layers = simulate(trace, slots, std::move(chosen), hooks);
    }
    py::dict result;
    const auto column = [&](const char* name, int64_t LayerCounts::* field) {
        py::array_t<int64_t> out(static_cast<py::ssize_t>(layers.size()));
        int64_t* next = out.mutable_data();
        for (const LayerCounts& layer : layers) *next++ = layer.*field;
        result[name] = out;
    };
    column("decode_hits", &LayerCounts::decode_hits);
    column("decode_accesses", &LayerCounts::decode_accesses);
    column("prefill_hits", &LayerCounts::prefill_hits);
    column("prefill_accesses", &LayerCounts::prefill_accesses);
    column("evictions", &LayerCounts::evictions);
    if (step_misses) result["step_misses"] = copied(std::span<const uint16_t>(misses));
    return result;
}

}  // namespace

void bind_trace(py::module_& module) {
    using namespace py::literals;
    module.def(
        "check_trace",
        [](const Array<int16_t>& experts, const Array<int32_t>& sequence,
           const Array<uint8_t>& phase, int32_t num_experts, const std::string& name) {
            check_trace(view(experts, sequence, phase, std::nullopt, num_experts), name);
        },
        "experts"_a, "sequence"_a, "phase"_a, "num_experts"_a, "name"_a);
    module.def("simulate", &simulate_arrays, "experts"_a, "sequence"_a, "phase"_a, "router"_a,
               "num_experts"_a, "policy"_a, "slots"_a, "eamc"_a = py::none(),
               "priors"_a = py::none(), "progress"_a = py::none(), "step_misses"_a = false);
}

}  // namespace moeinf
