#include "cache/policies/best_kernels.h"

#include "cache/policies/best_kernels_code.h"

namespace moeinf::best {

const Kernels kPortable = make_kernels("portable");

const Kernels& fastest_kernels() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return kAvx2;
#endif
    return kPortable;
}

}  // namespace moeinf::best
