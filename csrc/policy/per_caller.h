// State that is kept apart for each caller of steps, so requests that run side by side stay apart.
// Bounded: beyond kMax callers the state that was unused for longest is removed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "policy/policy.h"

namespace moeinf {

template <class T>
class PerCaller {
public:
    static constexpr size_t kMax = 16;

    // The caller's state; `make()` makes one for a new caller. `leaves` receives a state before it
    // is removed. The address is valid until then.
    template <class Make, class Leaves>
    T& of(int64_t caller, Make make, Leaves leaves) {
        ++now_;
        auto found =
            std::ranges::find(entries_, caller, [](const auto& one) { return one->caller; });
        if (found == entries_.end() && entries_.size() == kMax) {
            found =
                std::ranges::min_element(entries_, {}, [](const auto& one) { return one->seen; });
            leaves((*found)->state);
            entries_.erase(found);
            found = entries_.end();
        }
        if (found == entries_.end()) {
            entries_.push_back(std::make_unique<Entry>(caller, now_, make()));
            return entries_.back()->state;
        }
        (*found)->seen = now_;
        return (*found)->state;
    }
    T& of(int64_t caller) {
        return of(caller, [] { return T(); }, [](const T&) {});
    }

    // Calls each(state) for all of them.
    template <class Each>
    void for_each(Each each) const {
        for (const auto& one : entries_) each(one->state);
    }

private:
    struct Entry {
        int64_t caller;
        uint64_t seen;
        T state;
        Entry(int64_t of_caller, uint64_t now, T made)
            : caller(of_caller), seen(now), state(std::move(made)) {}
    };
    std::vector<std::unique_ptr<Entry>> entries_;
    uint64_t now_ = 0;
};

// Tells where each caller's passes begin.
class PassStarts {
public:
    // Is this the first step of a pass? To be asked once for every step.
    bool at(const Step& step) {
        LayerId& layer = layers_.of(step.caller, [] { return kBeforeAny; }, [](LayerId) {});
        const bool begins = step.new_sequence || step.layer <= layer;
        layer = step.layer;
        return begins;
    }

private:
    static constexpr LayerId kBeforeAny{INT32_MAX};
    PerCaller<LayerId> layers_;
};

}  // namespace moeinf
