// AVX-512 without its bf16 products: every product in 32-bit floats.
#include "cpu_kernels/float_kernels.h"
#include "cpu_kernels/kernels_isa.h"
#include "floats/avx512.h"

namespace moeinf {

constinit const KernelSet kAvx512Kernels = FloatKernels<Floats512>::set("avx512", cpu_has_avx512);

}  // namespace moeinf
