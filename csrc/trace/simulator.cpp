#include "trace/simulator.h"

#include <algorithm>

#include "policy/residency.h"

namespace moeinf {
namespace {

constexpr int64_t kPassesPerReport = 4096;

}  // namespace

PerLayer<LayerCounts> simulate(const TraceView& trace, int32_t slots,
                               std::unique_ptr<Policy> policy, const SimulationHooks& hooks) {
    // Slots beyond the number of experts stay empty, and their number may be too large for memory.
    Residency residency(trace.shape(), std::min(slots, trace.shape().total()), std::move(policy));
    PerLayer<LayerCounts> layers(trace.layers);
    StepReader reader(trace);
    StepPlan plan;
    int64_t passes = 0;
    for (Step step; reader.next(step);) {
        residency.plan(step, plan);

        LayerCounts& counts = layers[step.layer];
        const auto accesses = static_cast<int64_t>(step.experts.size());
        const auto hits = static_cast<int64_t>(plan.hits.size());
        (step.prefill ? counts.prefill_accesses : counts.decode_accesses) += accesses;
        (step.prefill ? counts.prefill_hits : counts.decode_hits) += hits;
        for (const Placement& placement : plan.placements) {
            counts.evictions += is_some(placement.evicted);
        }
        if (hooks.step_misses != nullptr) {
            hooks.step_misses->push_back(static_cast<uint16_t>(accesses - hits));
        }
        if (!reader.pass_complete()) continue;
        if (hooks.after_pass) {
            hooks.after_pass(reader.first_token(), reader.end_token(), residency.policy());
        }
        if (++passes % kPassesPerReport == 0 && hooks.progress) hooks.progress(reader.end_token());
    }
    if (hooks.progress) hooks.progress(trace.tokens);
    return layers;
}

}  // namespace moeinf
