// The loops behind learned_kernels.h, included once per instruction set. Everything here has
// internal linkage. Of a function shared between files the linker keeps any one copy, and the copy
// for wide vectors does not run on every CPU. No libm: these polynomials vectorise and give the
// same bits on every machine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "policy/policies/learned_kernels.h"

namespace moeinf::learned {
namespace {

// log(x) for x > 0, to 1e-4 absolute: a Chebyshev fit of log2 over the mantissa.
inline float approximate_log(float x) {
    const auto bits = __builtin_bit_cast(int32_t, x);
    const auto exponent = static_cast<float>((bits >> 23) - 127);
    const float m = __builtin_bit_cast(float, (bits & 0x007fffff) | 0x3f800000);
    const float p =
        (((-0.08001088f * m + 0.63551112f) * m - 2.09940228f) * m + 4.04961689f) * m - 2.50561466f;
    return 0.69314718f * (exponent + p);
}

// 1 / (1 + exp(-x)), to 2e-4 relative, for |x| up to 80; beyond that as at 80.
inline float approximate_logistic(float x) {
    const float low = x < -80.0f ? -80.0f : x;
    const float kept = low > 80.0f ? 80.0f : low;
    const float t = -1.44269504f * kept + 128.0f;  // positive
    const auto whole = static_cast<int32_t>(t);
    const float f = t - static_cast<float>(whole);
    const float p = ((0.07908570f * f + 0.22451634f) * f + 0.69639055f) * f + 0.99989669f;
    const float power = __builtin_bit_cast(float, (whole - 1) << 23);  // 2^(whole - 128)
    return 1.0f / (1.0f + p * power);
}

// Of a rate kept within [0.002, 0.998].
inline float log_odds(float rate) {
    const float low = rate < 0.002f ? 0.002f : rate;
    const float kept = low > 0.998f ? 0.998f : low;
    return approximate_log(kept / (1.0f - kept));
}

void decay(float* __restrict uses, const float* __restrict counts, float keep, float gain,
           size_t n) {
    for (size_t e = 0; e < n; ++e) uses[e] = keep * uses[e] + gain * counts[e];
}

void begin_sums(const History& history, float* __restrict sums, size_t n) {
    const History h = history;
    for (size_t e = 0; e < n; ++e) {
        const float slow_rate = (h.slow[e] + h.added) * h.slow_scale;
        const float sequence_rate =
            (h.sequence[e] + kSequencePriorVisits * slow_rate) * h.sequence_scale;
        sums[e] =
            kConstant + h.bias[e] + kFastWeight * log_odds((h.fast[e] + h.added) * h.fast_scale) +
            (kSlowWeight - kSequenceWeight) * log_odds(slow_rate) +
            kSequenceWeight * log_odds(sequence_rate) + kRecencyWeight / (1.0f + h.unused_for[e]);
    }
}

void count_visits(float* __restrict unused_for, const float* __restrict counts, size_t n) {
    for (size_t e = 0; e < n; ++e) unused_for[e] = counts[e] > 0.0f ? 0.0f : unused_for[e] + 1.0f;
}

// Four vectors at a time, so sums and errors stay in registers during the loop over rows.
using Vector = float __attribute__((vector_size(32)));
constexpr size_t kBlock = 32;  // floats

inline void load(const float* from, Vector& a, Vector& b, Vector& c, Vector& d) {
    __builtin_memcpy(&a, from, sizeof a);
    __builtin_memcpy(&b, from + 8, sizeof b);
    __builtin_memcpy(&c, from + 16, sizeof c);
    __builtin_memcpy(&d, from + 24, sizeof d);
}

inline void store(float* to, const Vector& a, const Vector& b, const Vector& c, const Vector& d) {
    __builtin_memcpy(to, &a, sizeof a);
    __builtin_memcpy(to + 8, &b, sizeof b);
    __builtin_memcpy(to + 16, &c, sizeof c);
    __builtin_memcpy(to + 24, &d, sizeof d);
}

void add_rows(float* sums, const float* const* rows, size_t num_rows, size_t n) {
    size_t from = 0;
    for (; from + kBlock <= n; from += kBlock) {
        Vector a, b, c, d;
        load(sums + from, a, b, c, d);
        for (size_t r = 0; r < num_rows; ++r) {
            Vector row_a, row_b, row_c, row_d;
            load(rows[r] + from, row_a, row_b, row_c, row_d);
            a += row_a;
            b += row_b;
            c += row_c;
            d += row_d;
        }
        store(sums + from, a, b, c, d);
    }
    for (size_t r = 0; r < num_rows; ++r) {
        for (size_t e = from; e < n; ++e) sums[e] += rows[r][e];
    }
}

void learn_rows(float* const* rows, const float* rates, size_t num_rows, const float* errors,
                size_t n) {
    size_t from = 0;
    for (; from + kBlock <= n; from += kBlock) {
        Vector a, b, c, d;
        load(errors + from, a, b, c, d);
        for (size_t r = 0; r < num_rows; ++r) {
            Vector row_a, row_b, row_c, row_d;
            load(rows[r] + from, row_a, row_b, row_c, row_d);
            const float rate = rates[r];
            store(rows[r] + from, row_a + a * rate, row_b + b * rate, row_c + c * rate,
                  row_d + d * rate);
        }
    }
    for (size_t r = 0; r < num_rows; ++r) {
        for (size_t e = from; e < n; ++e) rows[r][e] += errors[e] * rates[r];
    }
}

void add(float* __restrict to, const float* __restrict from, float factor, size_t n) {
    for (size_t e = 0; e < n; ++e) to[e] += factor * from[e];
}

void outcomes(const float* __restrict counts, const float* __restrict sums,
              const float* __restrict values, float discount, float* __restrict errors, size_t n) {
    for (size_t e = 0; e < n; ++e) {
        // Without a choice between two values this loop vectorises, and no bit is different.
        const float used = counts[e] > 0.0f ? 1.0f : 0.0f;
        const float later = discount * approximate_logistic(sums[e]);
        errors[e] = (used + (1.0f - used) * later) - values[e];
    }
}

void logistic(const float* __restrict sums, float* __restrict values, size_t n) {
    for (size_t e = 0; e < n; ++e) values[e] = approximate_logistic(sums[e]);
}

constexpr Kernels make_kernels(const char* name) {
    return {name, decay, begin_sums, count_visits, add_rows, learn_rows, add, outcomes, logistic};
}

}  // namespace
}  // namespace moeinf::learned
