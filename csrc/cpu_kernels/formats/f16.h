// IEEE half precision.
#pragma once

#include "cpu_kernels/formats/plain.h"

namespace moeinf {
namespace {

struct F16Weights : Plain<F16> {
    static constexpr std::string_view kName = "f16";
};

}  // namespace
}  // namespace moeinf
