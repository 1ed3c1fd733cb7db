// The table of weight formats: one row, one decoder. Everything that depends on the format comes
// from here: facts and names (formats.cpp), and the products of every instruction set
// (float_kernels.h). Unnamed for the reason float_math.h gives.
#pragma once

#include <tuple>

#include "cpu_kernels/formats/bf16.h"
#include "cpu_kernels/formats/e2m1.h"
#include "cpu_kernels/formats/e4m3.h"
#include "cpu_kernels/formats/f16.h"
#include "cpu_kernels/formats/f32.h"
#include "cpu_kernels/formats/ggml.h"
#include "cpu_kernels/formats/int4.h"
#include "cpu_kernels/formats/int8.h"
#include "cpu_kernels/formats/palette.h"

namespace moeinf {
namespace {

using Decoders =
    std::tuple<Bf16Weights, F16Weights, F32Weights, E4M3Weights, E2M1Weights, Int8Weights,
               Int4Weights, Q80Weights, Q40Weights, Q41Weights, Q50Weights, Q51Weights,
               Iq4NlWeights, Mxfp4Weights, Iq4XsWeights, Q2KWeights, Q3KWeights, Q4KWeights,
               Q5KWeights, Q6KWeights, Palette3Weights, Palette7Weights, Palette15Weights>;

}  // namespace
}  // namespace moeinf
