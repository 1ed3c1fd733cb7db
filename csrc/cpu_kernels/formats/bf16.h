// The upper half of a float.
#pragma once

#include "cpu_kernels/formats/plain.h"

namespace moeinf {
namespace {

struct Bf16Weights : Plain<BF16> {
    static constexpr std::string_view kName = "bf16";
};

}  // namespace
}  // namespace moeinf
