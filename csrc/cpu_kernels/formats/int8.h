// Integers of eight bits.
#pragma once

#include "cpu_kernels/formats/plain.h"

namespace moeinf {
namespace {

struct Int8Weights {
    using Stored = int8_t;
    static constexpr std::string_view kName = "int8";
    static constexpr int64_t kPack = 1;
    static constexpr bool kScaled = true;
    static constexpr bool kZeros = true;
};

}  // namespace
}  // namespace moeinf
