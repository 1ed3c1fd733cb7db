// Floats of eight bits: a sign, 4 bits of exponent and 3 of mantissa. 448 is the largest.
#pragma once

#include "cpu_kernels/formats/plain.h"

namespace moeinf {
namespace {

struct E4M3Weights {
    using Stored = E4M3;
    static constexpr std::string_view kName = "e4m3";
    static constexpr int64_t kPack = 1;
    static constexpr bool kScaled = true;
};

}  // namespace
}  // namespace moeinf
