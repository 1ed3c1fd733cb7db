// Weights that are numbers of one type, one after another, without scales. A decoder is a struct:
//
//   kName             the name of the format, as in moeinf/checkpoint/formats.py
//   Stored            type of the stored values
//   kPack             elements of a row in one stored value
//   kBlockCols        elements of a row that share a scale, a multiple of every kStep; 0: no scales
//   load<F>(row, k)   elements k to k + F::kLanes of a row, as floats
//   load_first<F>(row, k, n)   the first n < F::kLanes of them, the rest zero; reads nothing beyond
//
// and, where kBlockCols is not 0: kBlockRows, rows that share a scale; Scale, the type of a scale;
// scale(Scale), the number itself.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/dtype.h"

namespace moeinf {
namespace {

template <class T>
struct Plain {
    using Stored = T;
    static constexpr int64_t kPack = 1;
    static constexpr int64_t kBlockCols = 0;

    template <class F>
    static typename F::Vec load(const T* row, int64_t k) {
        return F::load(row + k);
    }
    template <class F>
    static typename F::Vec load_first(const T* row, int64_t k, int64_t n) {
        return F::load_first(row + k, n);
    }
};

}  // namespace
}  // namespace moeinf
