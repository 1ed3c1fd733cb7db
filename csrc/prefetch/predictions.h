// What is predicted for the next step of one layer, and what has become of it so far.
#pragma once

#include <algorithm>
#include <vector>

#include "base/ids.h"

namespace moeinf {

struct Prediction {
    ExpertId expert;
    float score;
    bool latest = true;                  // of the latest prediction for its layer
    bool absent = false;                 // not resident when it could have been fetched
    bool candidate = false;              // worth fetching, and within the budget
    bool issued = false;                 // its prefetch was started
    ExpertId evicted = ExpertId::kNone;  // by its prefetch
};

struct LayerPredictions {
    std::vector<Prediction> experts;
    bool fresh = false;        // not yet chosen from
    bool active = false;       // made in a pass that fetches
    size_t usual_experts = 0;  // of the latest decode step

    // Forgets an earlier prediction, but not what has been issued for it.
    void start(bool fetching) {
        std::erase_if(experts, [](const Prediction& one) { return !one.issued; });
        for (Prediction& one : experts) one.latest = false;
        fresh = true;
        active = fetching;
    }
    void add(ExpertId expert, float score) {
        const auto known = std::ranges::find(experts, expert, &Prediction::expert);
        if (known == experts.end()) {
            experts.push_back({.expert = expert, .score = score});
        } else {
            known->score = score;
            known->latest = true;
        }
    }
};

}  // namespace moeinf
