// Replays a trace through the classes of the live cache, Residency and Policy, and counts hits. A
// live run and the simulation of its trace have exactly the same hits, but for long prompts: it
// takes them as it takes short ones, see PromptShares. Moves no bytes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "policy/policy.h"
#include "trace/trace.h"

namespace moeinf {

struct LayerCounts {
    int64_t decode_hits = 0;
    int64_t decode_accesses = 0;  // distinct experts, summed over decode steps
    int64_t prefill_hits = 0;
    int64_t prefill_accesses = 0;
    int64_t evictions = 0;
};

struct SimulationHooks {
    // Called after each pass with its tokens [first, end). It may write priors into the policy.
    std::function<void(int64_t first, int64_t end, Policy& policy)> after_pass;
    // Called every few thousand passes and at the end, with the tokens done so far. It may throw to
    // stop.
    std::function<void(int64_t tokens)> progress;
    // Receives the misses of every step, in order. May be null.
    std::vector<uint16_t>* step_misses = nullptr;
};

// The trace must have passed check_trace(). Throws Error(kInvalid) for fewer than one slot.
PerLayer<LayerCounts> simulate(const TraceView& trace, int32_t slots,
                               std::unique_ptr<Policy> policy, const SimulationHooks& hooks);

}  // namespace moeinf
