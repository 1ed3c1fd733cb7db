// One function per file of bindings; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace moeinf {

void bind_errors(pybind11::module_& module);
void bind_compute(pybind11::module_& module);
void bind_byte_source(pybind11::module_& module);
void bind_catalog(pybind11::module_& module);
void bind_pool(pybind11::module_& module);
void bind_file_reader(pybind11::module_& module);
void bind_probe(pybind11::module_& module);
void bind_device(pybind11::module_& module);
void bind_host_tier(pybind11::module_& module);
void bind_cache(pybind11::module_& module);
void bind_step_stream(pybind11::module_& module);
void bind_fused_experts(pybind11::module_& module);
void bind_linear(pybind11::module_& module);
void bind_rms_norm(pybind11::module_& module);
void bind_attention_inputs(pybind11::module_& module);
void bind_top_k(pybind11::module_& module);
void bind_eam(pybind11::module_& module);
void bind_trace(pybind11::module_& module);

struct HostTierStats;
pybind11::dict to_dict(const HostTierStats& stats);

}  // namespace moeinf
