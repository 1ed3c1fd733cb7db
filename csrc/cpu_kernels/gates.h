// The table of gate functions and the table of activations, for every instruction set. One row is a
// name and one line of vector arithmetic; kernels/gates.py has the same rows for the GPU, and the
// slow references. Gate and up are 32-bit floats for all weights and tokens, so a variant
// that converts both to float32 first (Beam's) is `glu`. NaN stays NaN in every row.
// Unnamed for the reason float_math.h gives.
#pragma once

#include <string_view>
#include <tuple>

#include "cpu_kernels/float_math.h"
#include "cpu_kernels/gate.h"

namespace moeinf {
namespace {

template <class F>
using Vec = typename F::Vec;

struct Silu {
    static constexpr std::string_view kName = "silu";
    template <class F>
    static Vec<F> of(Vec<F> x) {
        return times_logistic<F>(x, x);
    }
};

struct Gelu {
    static constexpr std::string_view kName = "gelu";
    template <class F>
    static Vec<F> of(Vec<F> x) {
        return gelu_erf<F>(x);
    }
};

struct GeluTanh {
    static constexpr std::string_view kName = "gelu_tanh";
    template <class F>
    static Vec<F> of(Vec<F> x) {
        return gelu_tanh<F>(x);
    }
};

struct Relu {
    static constexpr std::string_view kName = "relu";
    template <class F>
    static Vec<F> of(Vec<F> x) {
        return F::max(F::splat(0.0f), x);
    }
};

struct Relu2 {
    static constexpr std::string_view kName = "relu2";
    template <class F>
    static Vec<F> of(Vec<F> x) {
        return F::mul(Relu::of<F>(x), Relu::of<F>(x));
    }
};

using Activations = std::tuple<Silu, Gelu, GeluTanh, Relu, Relu2>;

// Which parts of a Gate a function reads.
struct Uses {
    bool up = true;
    bool activation = true;
    bool alpha = false;
    bool limit = false;
    bool finite_limit = false;
};

template <class F>
inline Vec<F> at_most(Vec<F> x, float limit) {
    return F::clamp(x, -__builtin_inff(), limit);
}

struct Glu {
    static constexpr std::string_view kName = "glu";
    static constexpr Uses kUses{};
    template <class F, class Act>
    static Vec<F> of(Vec<F> g, Vec<F> u, const Gate& /*gate*/) {
        return F::mul(Act::template of<F>(g), u);
    }
};

struct PlainGate {
    static constexpr std::string_view kName = "plain";
    static constexpr Uses kUses{.up = false};
    template <class F, class Act>
    static Vec<F> of(Vec<F> g, Vec<F> /*u*/, const Gate& /*gate*/) {
        return Act::template of<F>(g);
    }
};

struct SwigluOai {
    static constexpr std::string_view kName = "swiglu_oai";
    static constexpr Uses kUses{.activation = false, .alpha = true, .limit = true};
    template <class F, class Act>
    static Vec<F> of(Vec<F> g, Vec<F> u, const Gate& gate) {
        const Vec<F> m = at_most<F>(g, gate.limit);
        const Vec<F> shifted = F::add(F::clamp(u, -gate.limit, gate.limit), F::splat(1.0f));
        return F::mul(shifted, times_logistic<F>(m, F::mul(F::splat(gate.alpha), m)));
    }
};

struct ClampedGlu {
    static constexpr std::string_view kName = "clamped_glu";
    static constexpr Uses kUses{.limit = true};
    template <class F, class Act>
    static Vec<F> of(Vec<F> g, Vec<F> u, const Gate& gate) {
        return F::mul(Act::template of<F>(at_most<F>(g, gate.limit)),
                      F::clamp(u, -gate.limit, gate.limit));
    }
};

struct GluClamped {
    static constexpr std::string_view kName = "glu_clamped";
    static constexpr Uses kUses{.limit = true};
    template <class F, class Act>
    static Vec<F> of(Vec<F> g, Vec<F> u, const Gate& gate) {
        return F::mul(at_most<F>(Act::template of<F>(g), gate.limit),
                      F::clamp(u, -gate.limit, gate.limit));
    }
};

struct SoftcapSwiglu {
    static constexpr std::string_view kName = "softcap_swiglu";
    static constexpr Uses kUses{
        .activation = false, .alpha = true, .limit = true, .finite_limit = true};
    template <class F, class Act>
    static Vec<F> of(Vec<F> g, Vec<F> u, const Gate& gate) {
        return F::mul(times_logistic<F>(softcap<F>(g, gate.alpha), g), softcap<F>(u, gate.limit));
    }
};

using GateFunctions = std::tuple<Glu, PlainGate, SwigluOai, ClampedGlu, GluClamped, SoftcapSwiglu>;

}  // namespace
}  // namespace moeinf
