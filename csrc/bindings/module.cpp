// The compiled half of the package, imported as moeinf._core.
#include "bindings/bindings.h"

PYBIND11_MODULE(_core, module) {
    module.doc() = "Slots, transfers, residency and CPU kernels of moeinf.";
    moeinf::bind_errors(module);
    moeinf::bind_compute(module);
    moeinf::bind_transfer(module);
    moeinf::bind_device(module);
    moeinf::bind_cache(module);
    moeinf::bind_device_reader(module);
    moeinf::bind_cache_timing(module);
    moeinf::bind_fused_experts(module);
    moeinf::bind_trace(module);
}
