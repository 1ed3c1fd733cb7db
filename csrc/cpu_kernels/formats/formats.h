// Facts about each weight format for the CPU engine; its decoder is in another file.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "layout/matrix.h"

namespace moeinf {

struct FormatFacts {
    std::string_view name;
    int64_t stored_bytes;  // of one stored value, or block
    int64_t alignment;     // of it
    int64_t pack;          // elements in it
    int64_t group;         // elements that share a scale of the block; 0 without such scales
    bool scaled;           // whether a matrix may have scales
    bool zeros;            // and zero points
    int64_t tail;          // bytes of a row behind its last block
    int64_t most_cols;     // of a matrix; 0: any

    // Bytes of a row of `cols` elements.
    [[nodiscard]] int64_t row_bytes(int64_t cols) const {
        return cols / pack * stored_bytes + tail;
    }
};

[[nodiscard]] const FormatFacts& facts(WeightFormat format);
[[nodiscard]] std::vector<std::string> format_names();
// Throws Error(kInvalid) for an unknown name, listing those there are.
[[nodiscard]] WeightFormat find_format(std::string_view name);

}  // namespace moeinf
