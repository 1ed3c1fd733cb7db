// Which expert sits in which frame, and what a step changes about it. Pure bookkeeping: no threads,
// no bytes. The live cache drives it under its lock; the simulator drives it alone. A frame is a
// place on paper: the owner of a pool keeps a table of the slot that each frame has.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/ids.h"
#include "policy/policy.h"

namespace moeinf {

// An expert that must be brought into `frame`, where `evicted` sat (kNone: the frame was free).
struct Placement {
    ExpertId expert;
    FrameId frame;
    ExpertId evicted;
};

// What one step needs. Cleared and reused from step to step, so that planning does not allocate.
struct StepPlan {
    std::vector<ExpertId> hits;         // resident before the step
    std::vector<Placement> placements;  // misses that get a frame, in routing order
    std::vector<ExpertId> surplus;      // misses beyond what frames can hold: they pass through
};

class Residency {
public:
    // Throws Error(kInvalid) for fewer than one frame or no policy.
    Residency(ModelShape shape, int32_t frames, std::unique_ptr<Policy> policy);

    // Shows the step to the policy, then places its experts.
    void plan(const Step& step, StepPlan& out);

    // Counts exactly as the simulator documents: members of the set are never victims; misses are
    // inserted in the order given; what does not fit passes through and is not kept.
    void insert(std::span<const ExpertId> experts, StepPlan& out);

    // Makes room for one absent expert outside any step (a prefetch). False if nothing may be
    // evicted.
    bool place(ExpertId expert, Placement& out);

    // Takes a resident out (its read failed, or its frame goes away). It must not be pinned.
    void remove(ExpertId expert);

    // A pinned expert is never a victim. Pins count.
    void pin(ExpertId expert) noexcept { ++pins_[expert]; }
    void unpin(ExpertId expert) noexcept { --pins_[expert]; }
    [[nodiscard]] bool pinned(ExpertId expert) const noexcept { return pins_[expert] != 0; }

    // kNone: absent.
    [[nodiscard]] FrameId frame_of(ExpertId expert) const noexcept { return frame_of_[expert]; }
    [[nodiscard]] bool resident(ExpertId expert) const noexcept {
        return is_some(frame_of_[expert]);
    }
    // By frame, kNone: free. Closed frames that are still occupied come last.
    [[nodiscard]] std::span<const ExpertId> residents() const noexcept {
        return {residents_.data(), residents_.size()};
    }
    [[nodiscard]] int32_t frames() const noexcept { return frames_; }
    [[nodiscard]] bool is_open(FrameId frame) const noexcept { return number(frame) < frames_; }

    [[nodiscard]] bool has_free_frame() const noexcept { return !free_frames_.empty(); }

    // How many experts could be placed now: free frames and residents that may be evicted.
    [[nodiscard]] int32_t room() const noexcept;

    // Opens free frames at the end, or closes frames from the end. Residents of closed frames leave
    // at once, but a pinned one stays until its owner has unpinned and removed it; nothing else
    // ever enters a closed frame. Growing again reopens them.
    void resize(int32_t frames);
    // Two open frames trade places: the resident of one is found in the other.
    void exchange(FrameId frame, FrameId other);
    [[nodiscard]] int32_t occupied_closed_frames() const noexcept {
        return occupied_closed_frames_;
    }

    [[nodiscard]] Policy& policy() noexcept { return *policy_; }

private:
    void enter(ExpertId expert, FrameId frame, ExpertId evicted, Placement& out);
    FrameId take_free_frame() noexcept;
    void drop_unused_closed_frames();

    std::unique_ptr<Policy> policy_;
    int32_t frames_ = 0;
    int32_t occupied_closed_frames_ = 0;
    PerExpert<FrameId> frame_of_;
    PerFrame<ExpertId> residents_;
    Pins pins_;
    std::vector<FrameId> free_frames_;         // open ones; the next to use is last
    std::vector<ExpertId> missing_, victims_;  // scratch
};

}  // namespace moeinf
