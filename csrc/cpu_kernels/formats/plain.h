// Weights that are numbers of one type, one after another, without scales. The decoder of such a
// format is a struct:
//
//   kName             the name of the format, as in moeinf/checkpoint/formats.py
//   Stored            type of the stored values
//   kPack             elements of a row in one stored value
//   kScaled           whether they have scales: then dot_scaled.h multiplies them, else dot_tile.h
//   kZeros            is there if they may have zero points too
//
// The decoder of four-bit weights with scales has a table of the 16 values too. Element 2j of a row
// is the lower half of byte j, element 2j + 1 the upper half.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/dtype.h"

namespace moeinf {
namespace {

// Integers may have zero points.
template <class Decoder>
constexpr bool has_zeros = requires { Decoder::kZeros; };

template <class T>
struct Plain {
    using Stored = T;
    static constexpr int64_t kPack = 1;
    static constexpr bool kScaled = false;
};

}  // namespace
}  // namespace moeinf
