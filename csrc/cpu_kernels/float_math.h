// Vector mathematics of the gate functions (gates.h), conversions and sums, written once over a
// `Floats` type (see csrc/floats) and compiled for each instruction set. Included only by
// kernels_*.cpp. Everything is in an unnamed namespace, and calls no function of the standard
// library: one program holds several copies built with different flags, and the linker must never
// exchange one for another.
#pragma once

#include "cpu_kernels/kernels.h"

namespace moeinf {
namespace {

// e^x with a relative error of a few 1e-7: x = n ln 2 + r, |r| <= ln 2 / 2, a Taylor polynomial in
// r, and 2^n in two factors, so large x gives infinity and small x gives zero. The clamp keeps
// NaN.
template <class F>
inline typename F::Vec exp(typename F::Vec x) {
    x = F::clamp(x, -120.0f, 130.0f);
    const auto n = F::round(F::mul(x, F::splat(1.44269504f)));
    auto r = F::fma(n, F::splat(-0.693145752f), x);  // the upper bits of ln 2: n times it is exact
    r = F::fma(n, F::splat(-1.42860677e-6f), r);     // and the rest
    auto p = F::splat(1.0f / 5040);
    p = F::fma(p, r, F::splat(1.0f / 720));
    p = F::fma(p, r, F::splat(1.0f / 120));
    p = F::fma(p, r, F::splat(1.0f / 24));
    p = F::fma(p, r, F::splat(1.0f / 6));
    p = F::fma(p, r, F::splat(0.5f));
    p = F::fma(p, r, F::splat(1.0f));
    p = F::fma(p, r, F::splat(1.0f));
    const auto half = F::round(F::mul(n, F::splat(0.5f)));
    return F::mul(F::mul(p, F::pow2(half)), F::pow2(F::sub(n, half)));
}

// x / (1 + e^-y): x times the logistic function of y.
template <class F>
inline typename F::Vec times_logistic(typename F::Vec x, typename F::Vec y) {
    const auto one = F::splat(1.0f);
    return F::div(x, F::add(one, exp<F>(F::sub(F::splat(0.0f), y))));
}

// x * Phi(x). The tail erfc(z), z = |x| / sqrt 2, is e^(-z^2) times a polynomial in
// t = 1 / (1 + 0.44 z) without constant term, fitted for least relative error (2e-7) on [0, 10];
// so the result keeps its relative accuracy where 1 + erf would cancel.
template <class F>
inline typename F::Vec gelu_erf(typename F::Vec x) {
    const auto zero = F::splat(0.0f);
    const auto one = F::splat(1.0f);
    const auto z = F::mul(F::max(F::sub(zero, x), x), F::splat(0.707106781f));
    const auto t = F::div(one, F::fma(z, F::splat(0.44f), one));
    auto p = F::splat(0.0712234712f);
    p = F::fma(p, t, F::splat(-0.277948019f));
    p = F::fma(p, t, F::splat(0.29668747f));
    p = F::fma(p, t, F::splat(-0.0201806515f));
    p = F::fma(p, t, F::splat(0.215812222f));
    p = F::fma(p, t, F::splat(0.217313555f));
    p = F::fma(p, t, F::splat(0.24887118f));
    p = F::fma(p, t, F::splat(0.248220954f));
    const auto tail =
        F::mul(F::mul(F::mul(p, t), F::splat(0.5f)), exp<F>(F::mul(F::sub(zero, z), z)));
    return F::mul(x, F::where_negative(x, tail, F::sub(one, tail)));
}

// 0.5 x (1 + tanh u) is x times the logistic function of 2u.
template <class F>
inline typename F::Vec gelu_tanh(typename F::Vec x) {
    const auto cubic = F::fma(F::mul(x, x), F::splat(0.044715f), F::splat(1.0f));
    return times_logistic<F>(x, F::mul(F::mul(x, cubic), F::splat(1.59576912f)));
}

// tanh x. Near 0, where 1 - 2 / (e^2|x| + 1) would cancel, Lambert's continued fraction to x^2 / 9.
template <class F>
inline typename F::Vec tanh(typename F::Vec x) {
    const auto zero = F::splat(0.0f);
    const auto one = F::splat(1.0f);
    const auto z = F::mul(x, x);
    const auto above = F::fma(F::add(F::splat(105.0f), z), z, F::splat(945.0f));
    const auto below = F::fma(F::fma(F::splat(15.0f), z, F::splat(420.0f)), z, F::splat(945.0f));
    const auto near = F::mul(x, F::div(above, below));
    const auto size = F::max(F::sub(zero, x), x);
    const auto far = F::sub(one, F::div(F::splat(2.0f), F::add(exp<F>(F::add(size, size)), one)));
    const auto signed_far = F::where_negative(x, F::sub(zero, far), far);
    return F::where_negative(F::sub(size, F::splat(0.625f)), near, signed_far);
}

// cap * tanh(x / cap): x where it is small, never beyond cap.
template <class F>
inline typename F::Vec softcap(typename F::Vec x, float cap) {
    return F::mul(F::splat(cap), tanh<F>(F::div(x, F::splat(cap))));
}

template <class F, class In>
inline void widen_row(const In* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + F::kLanes <= count; i += F::kLanes) F::store(to + i, F::load(from + i));
    if (i < count) F::store_first(to + i, F::load_first(from + i, count - i), count - i);
}

template <class F>
inline void widen_any(const void* from, DType dtype, int64_t count, float* to) {
    switch (dtype) {
        case DType::kBF16:
            return widen_row<F>(static_cast<const BF16*>(from), count, to);
        case DType::kF16:
            return widen_row<F>(static_cast<const F16*>(from), count, to);
        case DType::kF32:
            return widen_row<F>(static_cast<const float*>(from), count, to);
    }
}

template <class F, class Out>
inline void combine_as(const CombineJob& job, Out* out) {
    for (int64_t h = 0; h < job.width; h += F::kLanes) {
        const int64_t lanes = job.width - h < F::kLanes ? job.width - h : F::kLanes;
        auto sum = F::splat(0.0f);
        for (int64_t j = 0; j < job.terms; ++j) {
            const auto y =
                lanes == F::kLanes ? F::load(job.y[j] + h) : F::load_first(job.y[j] + h, lanes);
            sum = F::add(sum, F::mul(F::splat(job.scale[j]), y));
        }
        if (lanes == F::kLanes) {
            F::store(out + h, sum);
        } else {
            F::store_first(out + h, sum, lanes);
        }
    }
}

template <class F>
inline void combine_any(const CombineJob& job) {
    switch (job.out_dtype) {
        case DType::kBF16:
            return combine_as<F>(job, static_cast<BF16*>(job.out));
        case DType::kF16:
            return combine_as<F>(job, static_cast<F16*>(job.out));
        case DType::kF32:
            return combine_as<F>(job, static_cast<float*>(job.out));
    }
}

}  // namespace
}  // namespace moeinf
