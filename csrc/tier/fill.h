// One expert on its way into one slot of a tier, and its waiters.
//
//   kUnderWay --> kComplete   all bytes are there or enqueued: the slot has the expert
//       +-------> kFailed     the source reports an error: the slot is free again
//
// A fill pins its expert while it is under way. Each waiter has a pin of its own. These pins end
// with the fill if it fails, and stay if it completes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/ids.h"
#include "device/timeline.h"
#include "transfer/read_job.h"

namespace moeinf {

// The place of a pinned expert in a tier. The bytes are there when `behind` has passed `point`, or
// now if `behind` is null.
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
    // `error` is not empty.
    virtual void on_pinned(const PinnedExpert& pinned, const std::string& error) noexcept = 0;

    const void* const owner;  // withdraws all of its waiters in its destructor
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
    bool moved_nothing = false;             // another process had filled the slot
    bool from_above = false;                // a demotion fills it, not the source
    uint32_t waiting = 0;                   // pins that end if it fails
    State state = State::kUnderWay;
    std::string error;                   // of a failed fill
    std::vector<FillWaiterPtr> waiters;  // each is counted in `waiting`
    std::shared_ptr<void> job;           // belongs to its source; Source::issuing guards it
};
using FillPtr = std::shared_ptr<Fill>;

}  // namespace moeinf
