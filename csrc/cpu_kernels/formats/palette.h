// bf16 in about 12 bits (layout/palette.h). kRare: the rare weights that a row may have; kTail: the
// bytes behind its last block.
#pragma once

#include <cstddef>

#include "cpu_kernels/formats/plain.h"
#include "layout/palette.h"

namespace moeinf {
namespace {

template <int kMost>
struct PaletteWeights {
    struct Stored {
        std::byte bytes[kPaletteBytes];
    };
    static constexpr int64_t kPack = kPaletteCols;
    static constexpr bool kScaled = false;
    static constexpr int kRare = kMost;
    static constexpr int64_t kTail = palette_tail(kMost);
};

struct Palette3Weights : PaletteWeights<3> {
    static constexpr std::string_view kName = "palette3";
};

struct Palette7Weights : PaletteWeights<7> {
    static constexpr std::string_view kName = "palette7";
};

struct Palette15Weights : PaletteWeights<15> {
    static constexpr std::string_view kName = "palette15";
};

template <class Decoder>
constexpr bool is_palette = requires { Decoder::kRare; };

}  // namespace
}  // namespace moeinf
