// A policy decides which experts are evicted. It sees every step and names victims. It never sees
// bytes, slots, leases or threads, and is called under its owner's lock. The live cache and the
// simulator use the same objects, so a simulation of a recorded run has exactly the same hits.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.h"

namespace moeinf {

// The data that a policy or a predictor has collected, so another run can start from it. Each kind
// knows its own.
struct Collection {
    virtual ~Collection() = default;
};

// One (forward pass, layer): the distinct experts it routes to.
struct Step {
    int64_t index = 0;  // steps seen so far
    LayerId layer{0};
    std::span<const ExpertId> experts;  // distinct, in order of first appearance
    std::span<const int32_t> counts;    // tokens routed to each of them
    // Of a long prompt: how much its latest tokens use each of `experts`. Else empty.
    std::span<const float> recent = {};
    std::span<const float> router;  // mean router probability of all experts; empty if unknown
    bool prefill = false;
    bool new_sequence = false;  // the first step of a request
    // The caller that runs the pass. The steps of one caller come in order, one request after
    // another. Steps of several callers may alternate in any way. Sequences that a caller runs in
    // one batch are one request.
    int64_t caller = 0;
};

// The number of leases and fills that hold each expert in its slot.
using Pins = PerExpert<uint32_t>;

class Policy {
public:
    virtual ~Policy() = default;
    virtual std::string_view name() const noexcept = 0;

    // Every step, before its misses are placed.
    virtual void observe(const Step& step) = 0;

    // Writes up to `victims.size()` residents to evict, best first, and returns their number.
    // `residents` are in the order of frames (kNone: a free frame). An expert with pins[expert] !=
    // 0 must not be named. Deterministic: ties go to the lower flat id.
    virtual size_t choose_victims(std::span<const ExpertId> residents, const Pins& pins,
                                  std::span<ExpertId> victims) = 0;

    // Receives the number of frames, before the first step and at each change.
    virtual void resized(int32_t /*frames*/) {}

    // Follow residency: an expert got a frame (after observe() if a step needed it, without
    // observe() if it was prefetched), or lost it for any reason.
    virtual void inserted(ExpertId /*expert*/) {}
    virtual void evicted(ExpertId /*expert*/) {}

    // Priors of all experts by flat id, in [0, 1], at most once per token. Most policies ignore
    // them.
    virtual void set_priors(std::span<const float> /*priors*/) {}

    // A copy of the data that it has collected. Null if it collects none.
    [[nodiscard]] virtual std::unique_ptr<Collection> collection() const { return nullptr; }
};

// A number that a policy can be given.
struct PolicyParameter {
    std::string_view name;
    double usual, least, greatest;
};

// The names of all policies, in the order in which they are shown.
std::vector<std::string> policy_names();

// Both take a policy's name, with or without parameters, and throw Error(kInvalid), naming what
// exists, for an unknown name.
std::span<const PolicyParameter> policy_parameters(std::string_view policy);
bool policy_collects(std::string_view policy);

// `policy` is a name, or a name with parameters: "decayed_lfu:keep=0.9:layer_weight=0". `from` is
// what the policies that collect start from, of this shape; null: from nothing; the others ignore
// it. Throws Error(kInvalid), naming what exists, for an unknown name or parameter or a value out
// of range.
std::unique_ptr<Policy> make_policy(std::string_view policy, ModelShape shape,
                                    const Collection* from = nullptr);

}  // namespace moeinf
