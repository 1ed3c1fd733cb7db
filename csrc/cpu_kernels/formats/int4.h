// Integers of four bits, stored with 8 added.
#pragma once

#include "cpu_kernels/formats/plain.h"

namespace moeinf {
namespace {

struct Int4Weights {
    using Stored = uint8_t;
    static constexpr std::string_view kName = "int4";
    static constexpr int64_t kPack = 2;
    static constexpr bool kScaled = true;
    static constexpr bool kZeros = true;
    static constexpr float kTable[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
};

}  // namespace
}  // namespace moeinf
