#include "policy/eam_follower.h"

#include <algorithm>
#include <utility>

namespace moeinf {

EamFollower::Phase::Phase(const EamCollection& known)
    : collection(known),
      match(collection),
      request(static_cast<size_t>(collection.shape().total()), 0.0f) {}

EamFollower::EamFollower(Eamc from, int32_t matched)
    : matched_(matched), known_(std::move(from)), latest_(&request_of(0)) {}

EamFollower::Request& EamFollower::request_of(int64_t caller) {
    return requests_.of(
        caller, [this] { return Request(known_); }, [this](Request& old) { finish(old); });
}

void EamFollower::observe(const Step& step) {
    Request& request = request_of(step.caller);
    latest_ = &request;
    if (step.new_sequence) finish(request);
    request.phase = step.prefill ? 0 : 1;
    Phase& phase = request.phases[request.phase];
    if (step.new_sequence || step.layer <= request.layer) phase.match.restart();
    request.layer = step.layer;
    for (size_t i = 0; i < step.experts.size(); ++i) {
        phase.request[index(step.experts[i])] +=
            step.counts.empty() ? 1.0f : static_cast<float>(step.counts[i]);
    }
    phase.active = phase.active || !step.experts.empty();
    phase.match.add_row(step.layer, step.experts, step.counts);
    phase.match.nearest(matched_, phase.nearest);
}

void EamFollower::finish(Request& request) {
    EamCollection* const collections[2] = {&known_.prefill, &known_.decode};
    for (size_t i = 0; i < 2; ++i) {
        Phase& phase = request.phases[i];
        if (phase.active) {
            collections[i]->add(phase.request);
            // Matches so far are with what was in it before.
            requests_.for_each([i](Request& other) { other.phases[i].match.restart(); });
        }
        std::fill(phase.request.begin(), phase.request.end(), 0.0f);
        phase.active = false;
        phase.match.restart();
    }
}

Eamc EamFollower::collections() const {
    Eamc all = known_;
    requests_.for_each([&](const Request& request) {
        if (request.phases[0].active) all.prefill.add(request.phases[0].request);
        if (request.phases[1].active) all.decode.add(request.phases[1].request);
    });
    return all;
}

bool EamFollower::predict(LayerId layer, std::span<float> shares) const {
    if (!is_some(latest_->layer)) return false;
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
