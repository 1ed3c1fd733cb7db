// The CPU engine and the expert FFN, as tests, benchmarks and `moeinf doctor` use them: memory is
// passed as addresses, which the Python caller keeps alive and has checked. `fused_experts` over a
// cache is bound elsewhere.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings/bindings.h"
#include "bindings/ids.h"
#include "compute/cpu_engine.h"
#include "compute/expert_ffn.h"
#include "cpu_kernels/formats/formats.h"
#include "probe/memory_read.h"

namespace py = pybind11;

namespace moeinf {
namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Slots by address: position in `slots` is the in-layer expert id.
void fused_experts_raw(CpuEngine& engine, const ExpertFfn& expert, const FfnInput& input,
                       const std::vector<uintptr_t>& slots, uintptr_t out, DType out_dtype) {
    if (slots.size() != static_cast<size_t>(input.num_experts)) {
        throw Error(ErrorCode::kInvalid, "expert FFN: one slot address for each of " +
                                             std::to_string(input.num_experts) +
                                             " experts expected, got " +
                                             std::to_string(slots.size()));
    }
    ExpertFfnCall call(engine, expert, input);
    std::vector<SlotOfExpert> ready;
    for (size_t p = 0; p < call.experts().size(); ++p) {
        const size_t id = index(call.experts()[p]);
        ready.push_back({static_cast<int32_t>(p), at<const std::byte>(slots[id])});
    }
    call.compute(ready);
    call.finish(at<void>(out), out_dtype);
}

void bind_types(py::module_& module) {
    py::enum_<DType>(module, "DType")
        .value("bf16", DType::kBF16)
        .value("f16", DType::kF16)
        .value("f32", DType::kF32);

    py::class_<Rows>(module, "Rows", "Bytes from the slot's start to row 0, and from row to row.")
        .def(py::init<uint64_t, int64_t>(), py::arg("offset"), py::arg("stride"));
    py::enum_<ScaleType>(module, "ScaleType")
        .value("f32", ScaleType::kF32)
        .value("bf16", ScaleType::kBF16)
        .value("f16", ScaleType::kF16)
        .value("e8m0", ScaleType::kE8M0)
        .value("e4m3", ScaleType::kE4M3);
    py::class_<Scales>(module, "Scales", "A number for each block of rows and columns (0: all).")
        .def(py::init<Rows, ScaleType, int64_t, int64_t, std::optional<Rows>>(), py::arg("rows"),
             py::arg("type"), py::arg("block_rows"), py::arg("block_cols"),
             py::arg("zeros") = py::none());
    py::class_<Matrix>(module, "Matrix")
        .def(py::init([](const std::string& format, int64_t rows, int64_t cols, Rows values,
                         std::optional<Scales> scales, std::optional<Rows> bias, DType bias_dtype,
                         std::optional<uint64_t> multiplier) {
                 return Matrix{find_format(format), rows,      cols, values, scales, bias,
                               bias_dtype,          multiplier};
             }),
             py::kw_only(), py::arg("format"), py::arg("rows"), py::arg("cols"), py::arg("values"),
             py::arg("scales") = py::none(), py::arg("bias") = py::none(),
             py::arg("bias_dtype") = DType::kF32, py::arg("multiplier") = py::none());
    py::class_<Gate>(module, "Gate")
        .def(py::init(&find_gate), py::arg("function"), py::arg("activation"), py::kw_only(),
             py::arg("alpha") = Gate().alpha, py::arg("limit") = Gate().limit);
    py::class_<ExpertFfn>(module, "ExpertFfn",
                          "What an expert computes, and where its matrices lie in a slot.")
        .def(py::init<Matrix, std::optional<Matrix>, Matrix, Gate>(), py::kw_only(),
             py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("function"));

    py::class_<FfnInput>(module, "FfnInput")
        .def(py::init([](uintptr_t hidden, DType hidden_dtype, uintptr_t topk_ids,
                         bool ids_are_int64, uintptr_t topk_weights, DType topk_weights_dtype,
                         int64_t tokens, int64_t top_k, int32_t num_experts, int64_t whole_tokens) {
                 return FfnInput{at<const void>(hidden),
                                 hidden_dtype,
                                 at<const void>(topk_ids),
                                 ids_are_int64,
                                 at<const void>(topk_weights),
                                 topk_weights_dtype,
                                 tokens,
                                 top_k,
                                 num_experts,
                                 whole_tokens};
             }),
             py::kw_only(), py::arg("hidden"), py::arg("hidden_dtype"), py::arg("topk_ids"),
             py::arg("ids_are_int64"), py::arg("topk_weights"), py::arg("topk_weights_dtype"),
             py::arg("tokens"), py::arg("top_k"), py::arg("num_experts"),
             py::arg("whole_tokens") = 0);
}

}  // namespace

void bind_compute(py::module_& module) {
    using release = py::call_guard<py::gil_scoped_release>;
    bind_types(module);

    module.def("weight_formats", &format_names, "The weight formats that the CPU computes with.");
    module.def("gate_functions", &gate_functions, "The gate functions that the CPU computes.");
    module.def("activations", &activations, "The activations of the gate functions.");
    module.def(
        "cpu_kernels",
        [] {
            std::vector<std::pair<std::string, bool>> sets;
            for (const KernelSet* set : kernel_sets())
                sets.emplace_back(set->name, set->supported());
            return sets;
        },
        "(name, whether this CPU can run it) of every set of CPU kernels, best first.");

    py::class_<CpuEngine>(module, "CpuEngine",
                          "Kernels of one instruction set, threads and scratch memory.")
        .def(py::init([](int threads, const std::string& kernels) {
                 return std::make_unique<CpuEngine>(threads, kernels);
             }),
             py::kw_only(), py::arg("threads") = 0, py::arg("kernels") = "")
        .def_property_readonly("threads", [](CpuEngine& self) { return self.pool().threads(); })
        .def_property_readonly("kernels", [](const CpuEngine& self) { return self.kernels().name; })
        .def(
            "read_all",
            [](CpuEngine& self, uintptr_t data, size_t nbytes, size_t task_bytes, int streams) {
                return read_all(self.pool(), at<const std::byte>(data), nbytes, task_bytes,
                                streams);
            },
            py::arg("data"), py::arg("nbytes"), py::kw_only(), py::arg("task_bytes"),
            py::arg("streams"), release(),
            "Reads nbytes at address `data` once with all threads; returns the or of its words.");

    py::class_<ExpertFfnCall>(module, "ExpertFfnCall")
        .def(py::init<CpuEngine&, const ExpertFfn&, const FfnInput&>(), py::arg("engine"),
             py::arg("expert"), py::arg("input"), py::keep_alive<1, 2>(), release())
        .def_property_readonly("experts",
                               [](const ExpertFfnCall& self) {
                                   return std::vector<ExpertIndex>(self.experts().begin(),
                                                                   self.experts().end());
                               })
        .def_property_readonly("counts",
                               [](const ExpertFfnCall& self) {
                                   return std::vector<int32_t>(self.counts().begin(),
                                                               self.counts().end());
                               })
        .def(
            "compute",
            [](ExpertFfnCall& self, const std::vector<std::pair<int32_t, uintptr_t>>& ready) {
                std::vector<SlotOfExpert> slots;
                for (const auto& [position, slot] : ready) {
                    slots.push_back({position, at<const std::byte>(slot)});
                }
                const py::gil_scoped_release unlocked;
                self.compute(slots);
            },
            py::arg("ready"), "Computes the experts at these (position, slot address) pairs.")
        .def(
            "finish",
            [](ExpertFfnCall& self, uintptr_t out, DType out_dtype) {
                self.finish(at<void>(out), out_dtype);
            },
            py::arg("out"), py::arg("out_dtype"), release())
        .def_static(
            "tokens_per_call",
            [](CpuEngine& engine, const ExpertFfn& expert, const FfnInput& input, size_t bytes) {
                return ExpertFfnCall::tokens_per_call(engine.kernels(), expert, input, bytes);
            },
            py::arg("engine"), py::arg("expert"), py::arg("input"), py::arg("scratch_bytes"));

    module.def("fused_experts_raw", &fused_experts_raw, py::arg("engine"), py::arg("expert"),
               py::arg("input"), py::kw_only(), py::arg("slots"), py::arg("out"),
               py::arg("out_dtype"), release(),
               "One whole call; slots[e] is the address of expert e, 0 where it has no route.");
}

}  // namespace moeinf
