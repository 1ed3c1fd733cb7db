// Compares requests in progress with collections of finished ones, for the policy `eam` and the
// predictor `eam`. Prefill and decode are traced and matched apart, and so are the requests of
// several callers. One thread at a time.
//
// The paper leaves some choices open. Here the pass in progress (iEAM) is matched over its rows so
// far, entries by the same rows, and the nearest few (kMatched) are summed. Before the first match
// the request's own matrix is used.
#pragma once

#include <span>
#include <vector>

#include "policy/eam.h"
#include "policy/per_caller.h"

namespace moeinf {

class EamFollower {
public:
    static constexpr int32_t kMatched = 3;

    // One phase of the request.
    struct Phase {
        explicit Phase(const EamCollection& known);

        const EamCollection& collection;
        EamMatch match;
        std::vector<float> request;    // its rEAM so far
        std::vector<int32_t> nearest;  // entries, nearest first
        bool active = false;
    };

    explicit EamFollower(Eamc from, int32_t matched = kMatched);
    EamFollower(const EamFollower&) = delete;  // requests refer to the collections
    EamFollower& operator=(const EamFollower&) = delete;

    // A new sequence ends its caller's previous request, which is added to the collections. So is
    // the request of a caller that is forgotten because too many are known.
    void observe(const Step& step);

    // The phase of the latest step; decode before any.
    [[nodiscard]] const Phase& current() const noexcept { return latest_->current(); }

    // The collections as if the requests in progress ended now. The requests go on.
    [[nodiscard]] Eamc collections() const;

    // Each expert's share of the predicted uses of `layer`. False before the first step.
    bool predict(LayerId layer, std::span<float> shares) const;

private:
    // What one caller is at.
    struct Request {
        explicit Request(const Eamc& known) : phases{Phase(known.prefill), Phase(known.decode)} {}
        [[nodiscard]] const Phase& current() const noexcept { return phases[phase]; }

        Phase phases[2];  // prefill, decode
        size_t phase = 1;
        LayerId layer = LayerId::kNone;  // of the latest step
    };

    Request& request_of(int64_t caller);
    void finish(Request& request);

    int32_t matched_;
    Eamc known_;
    PerCaller<Request> requests_;
    Request* latest_;
};

}  // namespace moeinf
