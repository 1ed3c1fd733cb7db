#include "cpu_kernels/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <string>

#include "base/error.h"
#include "cpu_kernels/kernels_isa.h"

namespace moeinf {
namespace {

constexpr const KernelSet* kSets[] = {
#if defined(__x86_64__)
    &kAmxKernels,      &kAvx512Bf16Kernels, &kAvx512Kernels, &kAvx2Kernels,
#endif
    &kPortableKernels,
};

std::string list_sets() {
    std::string text;
    for (const KernelSet* set : kSets) {
        if (!text.empty()) text += ", ";
        text += set->name;
        if (!set->supported()) text += " (not on this CPU)";
    }
    return text;
}

}  // namespace

#if defined(__x86_64__)
// These tests include whether the operating system saves the registers of a thread.
bool cpu_has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

bool cpu_has_avx512() {
    return cpu_has_avx2() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}

bool cpu_has_avx512bf16() {
    return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vnni");
}

// Linux gives the registers of tiles to processes that ask for them.
bool cpu_has_amx() {
    static const bool found = [] {
        constexpr unsigned kTiles = 1u << 24, kBf16 = 1u << 22;  // in edx of leaf 7
        constexpr long kAskForState = 0x1023, kTileData = 18;
        unsigned a = 0, b = 0, c = 0, d = 0;
        if (!cpu_has_avx512bf16() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
        if ((d & kTiles) == 0 || (d & kBf16) == 0) return false;
        return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
    }();
    return found;
}
#endif

std::span<const KernelSet* const> kernel_sets() {
    return kSets;
}

const KernelSet& select_kernels(std::string_view name) {
    for (const KernelSet* set : kSets) {
        if (name.empty() ? !set->supported() : set->name != name) continue;
        if (set->supported()) return *set;
        throw Error(ErrorCode::kUnsupported,
                    "kernels '" + std::string(name) +
                        "' need instructions this CPU lacks; there are: " + list_sets());
    }
    throw Error(ErrorCode::kInvalid,
                "no kernels are named '" + std::string(name) + "'; there are: " + list_sets());
}

}  // namespace moeinf
