// Floats of four bits: a sign, 2 bits of exponent and 1 of mantissa.
#pragma once

#include "cpu_kernels/formats/plain.h"

namespace moeinf {
namespace {

struct E2M1Weights {
    using Stored = uint8_t;
    static constexpr std::string_view kName = "e2m1";
    static constexpr int64_t kPack = 2;
    static constexpr bool kScaled = true;
    static constexpr float kTable[16] = {0,     0.5f,  1,  1.5f,  2,  3,  4,  6,
                                         -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
};

}  // namespace
}  // namespace moeinf
