#include "policy/policies/learned_kernels.h"

#include "policy/policies/learned_kernels_code.h"

namespace moeinf::learned {

const Kernels kPortable = make_kernels("portable");

const Kernels& fastest_kernels() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return kAvx2;
#endif
    return kPortable;
}

}  // namespace moeinf::learned
