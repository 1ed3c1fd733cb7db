// AVX-512 without its bf16 products: every product in 32-bit floats.
#include "compute/float_kernels.h"
#include "compute/floats_avx512.h"
#include "compute/kernels_isa.h"

namespace moeinf {

constinit const KernelSet kAvx512Kernels = FloatKernels<Floats512>::set("avx512", cpu_has_avx512);

}  // namespace moeinf
