// Kernels for any CPU.
#include "compute/float_kernels.h"
#include "compute/floats_portable.h"
#include "compute/kernels_isa.h"

namespace moeinf {
namespace {

bool always() {
    return true;
}

}  // namespace

constinit const KernelSet kPortableKernels = FloatKernels<Floats128>::set("portable", always);

}  // namespace moeinf
