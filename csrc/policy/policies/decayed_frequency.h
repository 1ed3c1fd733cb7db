// Arithmetic of "decayed frequency with layer distance": plain functions over plain arrays, for the
// host policy and for a planner on a device, which must decide identically. Only additions and
// multiplications of doubles in a fixed order, so that both get the same bits.
//
// An expert's frequency is an exponential average over tokens, EMA <- 0.95 * EMA + (1 if used).
// Rather than decaying every average at every token, a use counts for more the later it comes: with
// `unit` growing by 1 / 0.95 per token and weight += unit at each use, weight / unit is the EMA.
// Scores are only compared, so the division is left out.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moeinf::decayed_frequency {

inline constexpr double kGrowthPerToken = 1.0 / 0.95;
// When `unit` passes 2^64 everything is scaled by 2^-64, which is exact. A weight that nothing adds
// to reaches zero after some 14,000 tokens.
inline constexpr double kRescaleAbove = 0x1p64;
inline constexpr double kRescaleBy = 0x1p-64;

// Layers the model still computes before it visits `layer` again, in 1..num_layers: the current
// layer's own turn is now, so its other experts wait for the whole next token.
constexpr int32_t layers_until_next_visit(int32_t layer, int32_t current, int32_t num_layers) {
    return layer > current ? layer - current : layer - current + num_layers;
}

constexpr double nearness(int32_t layer, int32_t current, int32_t num_layers) {
    return 1.0 - 0.5 * layers_until_next_visit(layer, current, num_layers) / num_layers;
}

constexpr double score(double weight, double layer_nearness) {
    return weight * layer_nearness;
}

// Starts a token (a forward pass): what was used before counts for less from now on. True if the
// weights were scaled.
inline bool start_token(double* weights, size_t num_weights, double& unit) {
    unit *= kGrowthPerToken;
    if (unit <= kRescaleAbove) return false;
    unit *= kRescaleBy;
    for (size_t i = 0; i < num_weights; ++i) weights[i] *= kRescaleBy;
    return true;
}

}  // namespace moeinf::decayed_frequency
