#if defined(__x86_64__)

#include "cache/policies/best_kernels_code.h"

namespace moeinf::best {

const Kernels kAvx2 = make_kernels("avx2");

}  // namespace moeinf::best

#endif
