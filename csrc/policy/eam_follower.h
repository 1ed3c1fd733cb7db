// Compares a request in progress with collections of finished ones, for the policy `eam` and the
// predictor `eam`. Prefill and decode are traced and matched apart. One thread at a time.
//
// The paper leaves some choices open. Here the pass in progress (iEAM) is matched over its rows so
// far, entries by the same rows, and the nearest few (kMatched) are summed. Before the first match
// the request's own matrix is used.
#pragma once

#include <span>
#include <vector>

#include "policy/eam.h"

namespace moeinf {

class EamFollower {
public:
    static constexpr int32_t kMatched = 3;

    // One phase of the request.
    struct Phase {
        explicit Phase(EamCollection from);
        Phase(Phase&& other) noexcept;  // `match` refers to `collection`

        EamCollection collection;
        EamMatch match;
        std::vector<float> request;    // its rEAM so far
        std::vector<int32_t> nearest;  // entries, nearest first
        bool active = false;
    };

    explicit EamFollower(Eamc from, int32_t matched = kMatched);

    // A new sequence ends the previous request, which is added to the collections.
    void observe(const Step& step);

    // The phase of the latest step; decode before any.
    [[nodiscard]] const Phase& current() const noexcept { return phases_[phase_]; }

    // The collections as if the request in progress ended now. The request goes on.
    [[nodiscard]] Eamc collections() const;

    // Each expert's share of the predicted uses of `layer`. False before the first step.
    bool predict(LayerId layer, std::span<float> shares) const;

private:
    static void finish_request(Phase& phase);

    int32_t matched_;
    Phase phases_[2];  // prefill, decode
    size_t phase_ = 1;
    LayerId layer_ = LayerId::kNone;  // of the latest step
};

}  // namespace moeinf
