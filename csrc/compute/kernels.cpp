#include "compute/kernels.h"

#include <string>

#include "base/error.h"
#include "compute/kernels_isa.h"

namespace moeinf {
namespace {

constexpr const KernelSet* kSets[] = {
#if defined(__x86_64__)
    &kAvx512Bf16Kernels,
    &kAvx512Kernels,
    &kAvx2Kernels,
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
    return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16");
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
