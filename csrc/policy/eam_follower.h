// A request as it goes, seen against collections of finished ones: what the policy `eam` and the
// predictor `eam` share. Prefill and decode are traced and matched apart, and so are the requests
// of several callers. One thread at a time.
//
// Chosen where the paper is silent: the pass in progress (iEAM) is matched over its rows so far,
// and entries by the same rows; the nearest few (kMatched) are summed; before anything can be
// matched, the request's own matrix so far stands in.
#pragma once

#include <span>
#include <vector>

#include "policy/eam.h"
#include "policy/per_caller.h"

namespace moeinf {

class EamFollower {
public:
    static constexpr int32_t kMatched = 3;

    // What is known of one phase of the request.
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

    // A new sequence ends its caller's request before it, which joins the collections. So does the
    // request of a caller that gives up its place among those known.
    void observe(const Step& step);

    // The phase of the latest step; decode before any.
    [[nodiscard]] const Phase& current() const noexcept { return latest_->current(); }

    // The collections as they would be if the requests in progress ended now; they go on.
    [[nodiscard]] Eamc collections() const;

    // Each expert's share of what `layer` is predicted to use. False before the first step.
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
