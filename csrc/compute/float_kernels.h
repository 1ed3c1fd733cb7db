// The kernel set that multiplies in 32-bit floats, for any `Floats` type (see floats_*.h). Included
// only by kernels_*.cpp. The sets are constants, so that making the table of them runs no code
// built for an instruction set that this CPU may lack.
#pragma once

#include "compute/dot_tile.h"
#include "compute/float_math.h"

namespace moeinf {
namespace {

template <class F>
struct FloatKernels {
    static DType activation_dtype(DType /*hidden*/, DType /*weights*/) { return DType::kF32; }

    static void dot(DType /*activations*/, DType weights, const DotJob& job) {
        dot_any<F>(weights, job);
    }

    static void activate(Activation act, const float* gate, const float* up, int64_t count,
                         void* out, DType /*out_dtype*/) {
        activate_as<F>(act, gate, up, count, static_cast<float*>(out));
    }

    static void widen(const void* from, DType dtype, int64_t count, float* to) {
        widen_any<F>(from, dtype, count, to);
    }

    static void combine(const CombineJob& job) { combine_any<F>(job); }

    static constexpr KernelSet set(std::string_view name, bool (*supported)()) {
        return {name, supported, activation_dtype, dot, activate, widen, combine};
    }
};

}  // namespace
}  // namespace moeinf
