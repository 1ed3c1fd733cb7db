// What decides who leaves. A policy sees every step and names victims; it never sees bytes, slots,
// leases or threads, and is called under its owner's lock. The live cache and the simulator drive
// the same objects, so that a simulation of a recorded run gives the same hits to the unit.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.h"

namespace moeinf {

struct Eamc;        // in eam.h
class EamFollower;  // in eam_follower.h

// One (forward pass, layer): the distinct experts it routes to.
struct Step {
    int64_t index = 0;  // steps seen so far
    LayerId layer{0};
    std::span<const ExpertId> experts;  // distinct, in order of first appearance
    std::span<const int32_t> counts;    // tokens routed to each of them
    std::span<const float> router;      // mean router probability of all experts; empty if unknown
    bool prefill = false;
    bool new_sequence = false;  // the first step of a request
    // Who runs the pass. The steps of one caller come in order, one request after another; those of
    // several come in any mixture. Sequences that a caller runs in one batch are one request.
    int64_t caller = 0;
};

// How many leases and reads hold each expert where it is.
using Pins = PerExpert<uint32_t>;

class Policy {
public:
    virtual ~Policy() = default;
    virtual std::string_view name() const noexcept = 0;

    // Every step, before its misses are placed.
    virtual void observe(const Step& step) = 0;

    // Writes up to `victims.size()` residents to evict, best first, and returns how many it found.
    // `residents` come in the order of frames (kNone: a free one); an expert with pins[expert] != 0
    // may not be named. Deterministic: ties go to the lower flat id.
    virtual size_t choose_victims(std::span<const ExpertId> residents, const Pins& pins,
                                  std::span<ExpertId> victims) = 0;

    // How many frames there are, before the first step and at each change.
    virtual void resized(int32_t /*frames*/) {}

    // Kept in step with residency: an expert got a frame (after observe() if a step needed it,
    // alone if a prefetch brought it), or lost it for any reason.
    virtual void inserted(ExpertId /*expert*/) {}
    virtual void evicted(ExpertId /*expert*/) {}

    // Host-side priors per flat expert in [0, 1], written at most once per token; most ignore them.
    virtual void set_priors(std::span<const float> /*priors*/) {}

    // Where a policy keeps a collection of activation matrices; null: it keeps none.
    [[nodiscard]] virtual const EamFollower* follower() const noexcept { return nullptr; }
};

// The names make_policy accepts, in the order they are shown.
std::vector<std::string> policy_names();

// `eamc` is what the policies with a collection start from, of this shape; null: from nothing.
// Throws Error(kInvalid), naming what exists, for an unknown name.
std::unique_ptr<Policy> make_policy(std::string_view name, ModelShape shape,
                                    const Eamc* eamc = nullptr);

}  // namespace moeinf
