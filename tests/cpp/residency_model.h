// The experts that a cache must hold after each step, computed slowly: it keeps whole histories and
// computes every score from them. Shares no code with the cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// Those it can tell; the others have tests of their own.
inline const std::vector<std::string> kModelledPolicies{"lru", "lfu", "decayed_lfu"};

struct ResidencyModel {
    std::string policy;
    int layers, experts_per_layer;
    size_t slots;
    int step = -1, token = -1, layer = 0;
    std::set<int> resident;
    std::map<int, int> entered;                            // step at which a resident came in
    std::map<int, std::vector<std::pair<int, int>>> uses;  // expert -> (step, token)

    // Lower leaves first.
    std::tuple<double, double, int> score(int expert) {
        const auto& history = uses[expert];
        const double last = history.empty() ? -1 : history.back().first;
        if (policy == "lru") return {std::max<double>(last, entered[expert]), 0, expert};
        if (policy == "lfu") return {history.size(), last, expert};
        long double average = 0;
        for (const auto& use : history) average += std::pow(0.95L, token - use.second);
        int distance = 1;
        while ((layer + distance) % layers != expert / experts_per_layer) ++distance;
        return {static_cast<double>(average * (1.0L - 0.5L * distance / layers)), 0, expert};
    }

    bool admit(int expert, const std::set<int>& keep) {
        if (resident.size() == slots) {
            int victim = -1;
            for (int e : resident) {
                if (keep.count(e) == 0 && (victim < 0 || score(e) < score(victim))) victim = e;
            }
            if (victim < 0) return false;
            resident.erase(victim);
        }
        resident.insert(expert);
        entered[expert] = std::max(step, 0);
        return true;
    }

    // Returns (hits, placed).
    std::pair<int, int> take(int at_layer, const std::vector<int>& set, bool new_sequence,
                             std::set<int> keep) {
        ++step;
        if (step == 0 || new_sequence || at_layer <= layer) ++token;
        layer = at_layer;
        for (int e : set) uses[e].emplace_back(step, token);
        keep.insert(set.begin(), set.end());
        std::vector<int> missing;
        for (int e : set) {
            if (resident.count(e) == 0) missing.push_back(e);
        }
        int placed = 0;
        for (int e : missing) placed += admit(e, keep);
        return {static_cast<int>(set.size() - missing.size()), placed};
    }
};
