// The table of weight formats: one row, one decoder. Everything that depends on the format comes
// from here: facts and names (formats.cpp), and the products of every instruction set
// (float_kernels.h). Unnamed for the reason float_math.h gives.
#pragma once

#include <tuple>

#include "compute/formats/bf16.h"
#include "compute/formats/e2m1.h"
#include "compute/formats/e4m3.h"
#include "compute/formats/f16.h"
#include "compute/formats/f32.h"
#include "compute/formats/ggml.h"
#include "compute/formats/int4.h"
#include "compute/formats/int8.h"

namespace moeinf {
namespace {

using Decoders =
    std::tuple<Bf16Weights, F16Weights, F32Weights, E4M3Weights, E2M1Weights, Int8Weights,
               Int4Weights, Q80Weights, Q40Weights, Q50Weights, Q51Weights, Iq4NlWeights,
               Mxfp4Weights, Q4KWeights, Q5KWeights, Q6KWeights>;

}  // namespace
}  // namespace moeinf
