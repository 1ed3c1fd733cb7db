// moeinf._core.simulate: a trace as NumPy arrays in, counts per layer out.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "base/error.h"
#include "bindings/bindings.h"
#include "bindings/ids.h"
#include "policy/eam.h"
#include "policy/lowest_scores.h"
#include "trace/belady.h"
#include "trace/simulator.h"

namespace py = pybind11;

namespace moeinf {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::span<const T> values(const Array<T>& array) {
    return {array.data(), static_cast<size_t>(array.size())};
}

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

template <class T>
py::array_t<T> copied(std::span<const T> source) {
    return py::array_t<T>(static_cast<py::ssize_t>(source.size()), source.data());
}

py::array_t<int32_t> numbers(std::span<const ExpertId> experts) {
    py::array_t<int32_t> out(static_cast<py::ssize_t>(experts.size()));
    std::ranges::transform(experts, out.mutable_data(), number<ExpertId>);
    return out;
}

// A policy written in Python: observe(step) and score(residents), for research only.
class PythonPolicy final : public Policy {
public:
    explicit PythonPolicy(py::object policy) : policy_(std::move(policy)) {}
    ~PythonPolicy() override {
        py::gil_scoped_acquire gil;
        policy_ = py::object();
    }
    PythonPolicy(const PythonPolicy&) = delete;
    PythonPolicy& operator=(const PythonPolicy&) = delete;

    std::string_view name() const noexcept override { return "python"; }

    void observe(const Step& step) override {
        py::gil_scoped_acquire gil;
        py::dict seen;
        seen["index"] = step.index;
        seen["layer"] = step.layer;
        seen["experts"] = numbers(step.experts);
        seen["counts"] = copied(step.counts);
        seen["router"] = step.router.empty() ? py::object(py::none()) : copied(step.router);
        seen["prefill"] = step.prefill;
        seen["new_sequence"] = step.new_sequence;
        policy_.attr("observe")(py::module_::import("types").attr("SimpleNamespace")(**seen));
    }

    size_t choose_victims(std::span<const ExpertId> residents, const Pins& pins,
                          std::span<ExpertId> victims) override {
        candidates_.clear();
        for (const ExpertId expert : residents) {
            if (is_some(expert) && pins[expert] == 0) candidates_.push_back(expert);
        }
        py::gil_scoped_acquire gil;
        const auto scores = py::array_t<double, py::array::c_style | py::array::forcecast>(
            policy_.attr("score")(numbers(candidates_)));
        if (scores.ndim() != 1 || scores.size() != static_cast<py::ssize_t>(candidates_.size())) {
            throw Error(ErrorCode::kInvalid,
                        "score() of the policy: expected one value for each of " +
                            std::to_string(candidates_.size()) + " residents, found " +
                            std::to_string(scores.size()) + " in " + std::to_string(scores.ndim()) +
                            " dimensions");
        }
        const double* next = scores.data();
        const auto score_of = [&next](ExpertId expert) {
            const double score = *next++;
            if (!std::isnan(score)) return score;
            throw Error(ErrorCode::kInvalid,
                        "score() of the policy: expected numbers, found NaN for expert " +
                            std::to_string(number(expert)));
        };
        return lowest_scores(candidates_, pins, score_of, scored_, victims);
    }

private:
    py::object policy_;
    std::vector<ExpertId> candidates_;
    ScoredExperts<double> scored_;
};

std::unique_ptr<Policy> policy_for(const TraceView& trace, const py::object& policy,
                                   const std::optional<Eamc>& eamc) {
    if (!py::isinstance<py::str>(policy)) return std::make_unique<PythonPolicy>(policy);
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

void bind_eam(py::module_& module) {
    using namespace py::literals;
    py::class_<EamCollection>(module, "EamCollection",
                              "Activation matrices of finished requests; see csrc/policy/eam.h.")
        .def(py::init([](int32_t num_layers, int32_t num_experts, int32_t capacity) {
                 return EamCollection({num_layers, num_experts}, capacity);
             }),
             "num_layers"_a, "num_experts"_a, "capacity"_a)
        .def(
            "add",
            [](EamCollection& self, const Array<float>& matrix) { self.add(values(matrix)); },
            "matrix"_a)
        .def("__len__", &EamCollection::size)
        .def_property_readonly("capacity", &EamCollection::capacity)
        .def_property_readonly(
            "shape",
            [](const EamCollection& self) {
                return std::make_pair(self.shape().num_layers, self.shape().num_experts);
            },
            "Layers, and experts per layer.")
        .def("entries",
             [](const EamCollection& self) {
                 const ModelShape shape = self.shape();
                 py::array_t<float> out({self.size(), shape.num_layers, shape.num_experts});
                 for (int32_t i = 0; i < self.size(); ++i) {
                     const auto entry = self.entry(i);
                     std::copy(entry.begin(), entry.end(),
                               out.mutable_data() + static_cast<size_t>(i) * entry.size());
                 }
                 return out;
             })
        .def("predict", [](const EamCollection& self, const std::vector<int32_t>& matched) {
            const ModelShape shape = self.shape();
            for (const int32_t index : matched) {
                if (index < 0 || index >= self.size()) throw py::index_error();
            }
            py::array_t<float> out({shape.num_layers, shape.num_experts});
            predict_activations(self, matched,
                                {out.mutable_data(), static_cast<size_t>(out.size())});
            return out;
        });
    py::class_<Eamc> eamc(module, "Eamc", "Two collections: of prompts, and of decoding.");
    eamc.attr("PAPER_CAPACITY") = Eamc::kPaperCapacity;
    eamc.def(py::init<EamCollection, EamCollection>(), "prefill"_a, "decode"_a)
        .def_readonly("prefill", &Eamc::prefill)
        .def_readonly("decode", &Eamc::decode);
    py::class_<EamMatch>(module, "EamMatch", "A growing matrix against a collection.")
        .def(py::init<const EamCollection&>(), "collection"_a, py::keep_alive<1, 2>())
        .def("restart", &EamMatch::restart)
        .def(
            "add_row",
            [](EamMatch& self, LayerId layer, const std::vector<ExpertId>& experts,
               const Array<int32_t>& counts) { self.add_row(layer, experts, values(counts)); },
            "layer"_a, "experts"_a, "counts"_a)
        .def(
            "nearest",
            [](EamMatch& self, int32_t count) {
                std::vector<int32_t> out;
                self.nearest(count, out);
                return out;
            },
            "count"_a);
}

}  // namespace

void bind_trace(py::module_& module) {
    using namespace py::literals;
    bind_eam(module);
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
