// The number formats of tokens, outputs and biases. 16-bit numbers are opaque bits: only the
// kernels of an instruction set turn them into floats. How weights are stored is another subject:
// layout/matrix.h.
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

// Numbers of eight bits: weights and scales only.
struct E4M3 {  // sign, 4 bits of exponent, 3 of mantissa; no infinity
    uint8_t bits;
};

struct E8M0 {  // 2^(bits - 127)
    uint8_t bits;
};

[[nodiscard]] constexpr size_t dtype_bytes(DType dtype) {
    switch (dtype) {
        case DType::kBF16:
            return sizeof(BF16);
        case DType::kF16:
            return sizeof(F16);
        case DType::kF32:
            return sizeof(float);
    }
    __builtin_unreachable();
}

}  // namespace moeinf
