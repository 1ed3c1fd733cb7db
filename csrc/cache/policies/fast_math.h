// Logarithm and logistic function for scores that are only compared: branch-free polynomials that
// compilers vectorise, the same bits on every machine (no libm, no fused multiply-add).
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace moeinf {

// log2(x) for x > 0, to 2e-4 absolute. The polynomial is a Chebyshev fit over the mantissa.
inline float approximate_log2(float x) {
    const auto bits = std::bit_cast<int32_t>(x);
    const auto exponent = static_cast<float>((bits >> 23) - 127);
    const float m = std::bit_cast<float>((bits & 0x007fffff) | 0x3f800000);
    const float p =
        (((-0.08001088f * m + 0.63551112f) * m - 2.09940228f) * m + 4.04961689f) * m - 2.50561466f;
    return exponent + p;
}

// 1 / (1 + exp(-x)), to 1e-4 relative, for |x| up to 80; beyond that as at 80.
inline float approximate_sigmoid(float x) {
    const float t = -1.44269504f * std::clamp(x, -80.0f, 80.0f) + 128.0f;  // positive
    const auto whole = static_cast<int32_t>(t);
    const float f = t - static_cast<float>(whole);
    const float p = ((0.07908570f * f + 0.22451634f) * f + 0.69639055f) * f + 0.99989669f;
    const float power = std::bit_cast<float>((whole - 1) << 23);  // 2^(whole - 128)
    return 1.0f / (1.0f + p * power);
}

}  // namespace moeinf
