// One expert on its way into one slot of a tier, and who waits for it.
//
//                     +-- its last byte is there, or enqueued --> kComplete: the slot has the
//                     expert
//   start -> kUnderWay
//                     +-- the source says what went wrong ------> kFailed: the slot is free again
//
// While a fill is under way it pins its expert. Each of those who wait for it has a pin of its own;
// these pins end with the fill if it fails, and stay if it completes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/ids.h"
#include "device/timeline.h"
#include "transfer/transfer.h"

namespace moeinf {

// Where a pinned expert lies in a tier. The bytes are there once `behind` has passed `point`; they
// are there now if it is null.
struct PinnedExpert {
    std::byte* bytes = nullptr;
    TimelinePtr behind;
    uint64_t point = 0;
};

// Waits in a tier for an expert that the tier above asked for.
class FillWaiter : public std::enable_shared_from_this<FillWaiter> {
public:
    FillWaiter(const void* the_owner, ExpertId the_expert) : owner(the_owner), expert(the_expert) {}
    virtual ~FillWaiter() = default;
    FillWaiter(const FillWaiter&) = delete;
    FillWaiter& operator=(const FillWaiter&) = delete;

    // Called once, from any thread, with no lock held. The expert is pinned for this waiter, unless
    // `error` says what went wrong.
    virtual void on_pinned(const PinnedExpert& pinned, const std::string& error) noexcept = 0;

    const void* const owner;  // who withdraws all of its waiters when it goes
    const ExpertId expert;
};
using FillWaiterPtr = std::shared_ptr<FillWaiter>;

struct Fill {
    enum class State : uint8_t { kUnderWay, kComplete, kFailed };

    ExpertId expert = ExpertId::kNone;
    SlotId slot = SlotId::kNone;
    int32_t staging = -1;  // index of its staging slot; -1: the slot is a resident's
    Priority priority = Priority::kDemand;  // as it was started
    bool demanded = false;                  // a step asked for it
    bool from_above = false;                // a demotion fills it, not the source
    uint32_t waiting = 0;                   // pins that end if it fails
    State state = State::kUnderWay;
    std::string error;                   // of a failed one
    std::vector<FillWaiterPtr> waiters;  // each is counted in `waiting`
    std::shared_ptr<void> job;           // its source's own, guarded by Source::issuing
};
using FillPtr = std::shared_ptr<Fill>;

}  // namespace moeinf
