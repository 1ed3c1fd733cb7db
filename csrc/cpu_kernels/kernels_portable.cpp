// Kernels for any CPU.
#include "cpu_kernels/float_kernels.h"
#include "cpu_kernels/kernels_isa.h"
#include "floats/portable.h"

namespace moeinf {
namespace {

bool always() {
    return true;
}

}  // namespace

constinit const KernelSet kPortableKernels = FloatKernels<Floats128>::set("portable", always);

}  // namespace moeinf
