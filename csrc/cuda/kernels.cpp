#include "cuda/kernels.h"

#ifdef MOEINF_FATBIN
// The assembler includes the bytes of the file. CMake builds this again when the file changes.
asm(".pushsection .rodata\n"
    ".balign 64\n"
    ".local moeinf_kernel_image\n"
    "moeinf_kernel_image:\n"
    ".incbin \"" MOEINF_FATBIN
    "\"\n"
    ".popsection\n");
extern "C" __attribute__((visibility("hidden"))) const unsigned char moeinf_kernel_image[];
#endif

namespace moeinf::cuda {

const void* kernel_image() noexcept {
#ifdef MOEINF_FATBIN
    return moeinf_kernel_image;
#else
    return nullptr;
#endif
}

}  // namespace moeinf::cuda
