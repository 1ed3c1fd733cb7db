// AVX2 with FMA and F16C: every product in 32-bit floats.
#include "cpu_kernels/float_kernels.h"
#include "cpu_kernels/kernels_isa.h"
#include "floats/avx2.h"

namespace moeinf {

constinit const KernelSet kAvx2Kernels = FloatKernels<Floats256>::set("avx2", cpu_has_avx2);

}  // namespace moeinf
