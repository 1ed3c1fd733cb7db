// The kernel set that multiplies in 32-bit floats, for any `Floats` type (see csrc/floats): one
// entry for each row of the tables of weight formats and gate functions. Included only by
// kernels_*.cpp. The sets are constants, so that making the table of them runs no code built for an
// instruction set that this CPU may lack.
#pragma once

#include <array>
#include <utility>

#include "cpu_kernels/decode_rows.h"
#include "cpu_kernels/dot_blocks.h"
#include "cpu_kernels/dot_scaled.h"
#include "cpu_kernels/dot_tile.h"
#include "cpu_kernels/formats/decoders.h"
#include "cpu_kernels/gates.h"
#include "cpu_kernels/palette_rows.h"

namespace moeinf {
namespace {

template <class F, class Function, class Act, class Out>
void gate_kernel(const GateJob& job) {
    const Gate gate = job.constants;
    auto* out = static_cast<Out*>(job.out);
    int64_t i = 0;
    for (; i + F::kLanes <= job.count; i += F::kLanes) {
        const auto g = F::load(job.gate + i);
        const auto u = Function::kUses.up ? F::load(job.up + i) : g;
        F::store(out + i, Function::template of<F, Act>(g, u, gate));
    }
    if (i < job.count) {
        const int64_t rest = job.count - i;
        const auto g = F::load_first(job.gate + i, rest);
        const auto u = Function::kUses.up ? F::load_first(job.up + i, rest) : g;
        F::store_first(out + i, Function::template of<F, Act>(g, u, gate), rest);
    }
}

// A set that multiplies bf16 by bf16 passes a type like this one, with the products it has.
struct NoBf16 {
    static constexpr bool kGates = false;
    template <class Decoder>
    static constexpr Product kProduct = {};
    template <class Decoder>
    static constexpr void (*kTiles)(const DotJob&) = nullptr;
};

template <class F, class Bf16 = NoBf16>
struct FloatKernels {
    template <class... Rows>
    static constexpr std::array<FormatKernels, sizeof...(Rows)> all_formats(
        std::tuple<Rows...>* /*table*/) {
        return {FormatKernels{float_product<Rows>(), Bf16::template kProduct<Rows>,
                              Bf16::template kTiles<Rows>, decode_rows<F, Rows>}...};
    }

    template <class Decoder>
    static constexpr Product float_product() {
        if constexpr (requires { Decoder::kBlock; }) {
            if constexpr (Decoder::kPack == Decoder::kCodes) {
                return block_product<ByteBlocksProduct<F>>();
            } else {
                return block_product<BlockFloatProduct<F, Decoder>>();
            }
        } else if constexpr (is_palette<Decoder>) {
            return {palette_product<F, FloatProduct<F, Bf16Weights>, Decoder>};
        } else if constexpr (has_zeros<Decoder>) {
            return scaled_product<IntegerFloatProduct<F, Decoder>>();
        } else if constexpr (Decoder::kScaled) {
            return scaled_product<ScaledFloatProduct<F, Decoder>>();
        } else {
            return {dot_block<FloatProduct<F, Decoder>>};
        }
    }

    // No kernel where the function has an activation of its own and another one is given.
    template <size_t kRow>
    static constexpr GateKernels gate_kernels() {
        constexpr size_t kActs = std::tuple_size_v<Activations>;
        using Function = std::tuple_element_t<kRow / kActs, GateFunctions>;
        using Act = std::tuple_element_t<kRow % kActs, Activations>;
        if constexpr (!Function::kUses.activation && kRow % kActs != 0) {
            return {nullptr, nullptr};
        } else if constexpr (Bf16::kGates) {
            return {gate_kernel<F, Function, Act, float>, gate_kernel<F, Function, Act, BF16>};
        } else {
            return {gate_kernel<F, Function, Act, float>, nullptr};
        }
    }
    template <size_t... kRows>
    static constexpr std::array<GateKernels, sizeof...(kRows)> all_gates(
        std::index_sequence<kRows...> /*rows*/) {
        return {gate_kernels<kRows>()...};
    }

    static constexpr auto kFormats = all_formats(static_cast<Decoders*>(nullptr));
    static constexpr auto kGates =
        all_gates(std::make_index_sequence<std::tuple_size_v<GateFunctions> *
                                           std::tuple_size_v<Activations>>());

    static void widen(const void* from, DType dtype, int64_t count, float* to) {
        widen_any<F>(from, dtype, count, to);
    }

    static void combine(const CombineJob& job) { combine_any<F>(job); }

    static constexpr KernelSet set(std::string_view name, bool (*supported)(),
                                   void (*arrange_tiles)(const void* const*, int64_t, int64_t,
                                                         void*) = nullptr) {
        return {name, supported, kFormats.data(), kGates.data(), arrange_tiles, widen, combine};
    }
};

}  // namespace
}  // namespace moeinf
