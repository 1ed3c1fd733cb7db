// IEEE single precision.
#pragma once

#include "cpu_kernels/formats/plain.h"

namespace moeinf {
namespace {

struct F32Weights : Plain<float> {
    static constexpr std::string_view kName = "f32";
};

}  // namespace
}  // namespace moeinf
