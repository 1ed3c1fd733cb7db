// A request as it goes, seen against collections of finished ones: what the policy `eam` and the
// predictor `eam` share. Prefill and decode are traced and matched apart. One thread at a time.
//
// Chosen where the paper is silent: the pass in progress (iEAM) is matched over its rows so far,
// and entries by the same rows; the nearest few (kMatched) are summed; before anything can be
// matched, the request's own matrix so far stands in.
#pragma once

#include <span>
#include <vector>

#include "policy/eam.h"

namespace moeinf {

class EamFollower {
public:
    static constexpr int32_t kMatched = 3;

    // What is known of one phase of the request.
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

    // A new sequence ends the request before it, which joins the collections.
    void observe(const Step& step);

    // The phase of the latest step; decode before any.
    [[nodiscard]] const Phase& current() const noexcept { return phases_[phase_]; }

    // The collections as they would be if the request in progress ended now; it goes on.
    [[nodiscard]] Eamc collections() const;

    // Each expert's share of what `layer` is predicted to use. False before the first step.
    bool predict(LayerId layer, std::span<float> shares) const;

private:
    static void finish_request(Phase& phase);

    int32_t matched_;
    Phase phases_[2];  // prefill, decode
    size_t phase_ = 1;
    LayerId layer_ = LayerId::kNone;  // of the latest step
};

}  // namespace moeinf
