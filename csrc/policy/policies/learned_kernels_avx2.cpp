#if defined(__x86_64__)

#include "policy/policies/learned_kernels_code.h"

namespace moeinf::learned {

const Kernels kAvx2 = make_kernels("avx2");

}  // namespace moeinf::learned

#endif
