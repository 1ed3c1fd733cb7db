// The number formats that weights, activations and outputs come in. 16-bit ones are opaque bits:
// only the kernels of an instruction set turn them into numbers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moeinf {

enum class DType : int32_t { kBF16, kF16, kF32 };

struct BF16 {
    uint16_t bits;
};

struct F16 {
    uint16_t bits;
};

[[nodiscard]] constexpr size_t dtype_bytes(DType dtype) {
    return dtype == DType::kF32 ? 4 : 2;
}

}  // namespace moeinf
