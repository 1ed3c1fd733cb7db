// The compiled half of the package, imported as moeinf._core.
#include "bindings/bindings.h"
#include "memory/available.h"

PYBIND11_MODULE(_core, module) {
    module.doc() = "Slots, transfers, residency and CPU kernels of moeinf.";
    moeinf::bind_errors(module);
    moeinf::bind_compute(module);
    moeinf::bind_byte_source(module);
    moeinf::bind_catalog(module);
    moeinf::bind_pool(module);
    moeinf::bind_file_reader(module);
    moeinf::bind_device(module);
    moeinf::bind_host_tier(module);
    moeinf::bind_eam(module);
    moeinf::bind_trace(module);
    moeinf::bind_cache(module);
    moeinf::bind_step_stream(module);
    moeinf::bind_probe(module);
    moeinf::bind_fused_experts(module);
    moeinf::bind_linear(module);
    moeinf::bind_rms_norm(module);
    moeinf::bind_attention_inputs(module);
    moeinf::bind_top_k(module);
    module.def(
        "promised_memory", &moeinf::promised_memory,
        "Bytes of RAM that caches of this process have and that nothing has touched so far.");
    module.def("available_memory", &moeinf::available_memory,
               "Bytes of RAM that this process could still take, or fewer in a control group.");
}
