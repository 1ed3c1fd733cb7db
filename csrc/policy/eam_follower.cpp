#include "policy/eam_follower.h"

#include <algorithm>
#include <utility>

namespace moeinf {

EamFollower::Phase::Phase(EamCollection from)
    : collection(std::move(from)),
      match(collection),
      request(static_cast<size_t>(collection.shape().total()), 0.0f) {}

EamFollower::Phase::Phase(Phase&& other) noexcept : Phase(std::move(other.collection)) {}

EamFollower::EamFollower(Eamc from, int32_t matched)
    : matched_(matched), phases_{Phase(std::move(from.prefill)), Phase(std::move(from.decode))} {}

void EamFollower::observe(const Step& step) {
    if (step.new_sequence) {
        for (Phase& phase : phases_) finish_request(phase);
    }
    phase_ = step.prefill ? 0 : 1;
    Phase& phase = phases_[phase_];
    if (step.new_sequence || step.layer <= layer_) phase.match.restart();
    layer_ = step.layer;
    for (size_t i = 0; i < step.experts.size(); ++i) {
        phase.request[index(step.experts[i])] +=
            step.counts.empty() ? 1.0f : static_cast<float>(step.counts[i]);
    }
    phase.active = phase.active || !step.experts.empty();
    phase.match.add_row(step.layer, step.experts, step.counts);
    phase.match.nearest(matched_, phase.nearest);
}

void EamFollower::finish_request(Phase& phase) {
    if (phase.active) phase.collection.add(phase.request);
    std::fill(phase.request.begin(), phase.request.end(), 0.0f);
    phase.active = false;
    phase.match.restart();
}

Eamc EamFollower::collections() const {
    Eamc all(phases_[0].collection, phases_[1].collection);
    if (phases_[0].active) all.prefill.add(phases_[0].request);
    if (phases_[1].active) all.decode.add(phases_[1].request);
    return all;
}

bool EamFollower::predict(LayerId layer, std::span<float> shares) const {
    if (!is_some(layer_)) return false;
    const Phase& phase = current();
    const ModelShape shape = phase.collection.shape();
    const auto width = static_cast<size_t>(shape.num_experts);
    const size_t first = shape.begin_of(layer);
    std::fill(shares.begin(), shares.end(), 0.0f);
    const auto add = [&](std::span<const float> matrix) {
        for (size_t e = 0; e < width; ++e) shares[e] += matrix[first + e];
    };
    for (const int32_t index : phase.nearest) add(phase.collection.entry(index));
    if (phase.nearest.empty()) add(phase.request);
    normalise_rows({1, shape.num_experts}, shares);
    return true;
}

}  // namespace moeinf
