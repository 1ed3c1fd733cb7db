#include "base/ranges.h"

#include <dlfcn.h>

namespace moeinf {
namespace {

struct Nvtx {
    int (*push)(const char*) = nullptr;
    int (*pop)() = nullptr;

    Nvtx() {
        void* const library = dlopen("libnvToolsExt.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) return;
        const auto found_push = dlsym(library, "nvtxRangePushA");
        const auto found_pop = dlsym(library, "nvtxRangePop");
        if (found_push == nullptr || found_pop == nullptr) return;
        push = reinterpret_cast<int (*)(const char*)>(found_push);
        pop = reinterpret_cast<int (*)()>(found_pop);
    }
};

const Nvtx& nvtx() noexcept {
    static const Nvtx found;
    return found;
}

}  // namespace

Range::Range(const char* name) noexcept {
    if (nvtx().push != nullptr) nvtx().push(name);
}

Range::~Range() {
    if (nvtx().pop != nullptr) nvtx().pop();
}

}  // namespace moeinf
