// A map from experts to frames, and the change that a step makes to it. It moves no bytes and has
// no threads. The live cache calls it under its lock; the simulator calls it alone. A frame is an
// entry of this map. The owner of a pool keeps a table that gives the slot of each frame.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/ids.h"
#include "policy/policy.h"
#include "policy/prompt_shares.h"

namespace moeinf {

// An expert that must be filled into `frame`. `evicted` was there before (kNone: the frame was
// free).
struct Placement {
    ExpertId expert;
    FrameId frame;
    ExpertId evicted;
};

// The plan of one step. It is cleared and used again for every step, so planning does not allocate.
struct StepPlan {
    std::vector<ExpertId> hits;         // resident before the step
    std::vector<Placement> placements;  // misses that get a frame, in routing order
    std::vector<ExpertId> surplus;      // misses that no frame can keep: they pass through
};

class Residency {
public:
    // Throws Error(kInvalid) for fewer than one frame or no policy.
    Residency(ModelShape shape, int32_t frames, std::unique_ptr<Policy> policy);

    // Shows the step to the policy, then places its experts. Where `recent` is known the layers
    // keep their shares, see PromptShares; a step without it ends that.
    void plan(const Step& step, StepPlan& out);

    // Counts as the simulator documents: members of the set are never victims, misses are inserted
    // in the given order, and experts that do not fit pass through and are not kept.
    void insert(std::span<const ExpertId> experts, StepPlan& out);

    // True if a layer keeps the expert during a long prompt.
    [[nodiscard]] bool keeps(ExpertId expert) const noexcept { return shares_.keeps(expert); }
    // Gives the frame of a resident that is not pinned to an absent expert.
    void replace(ExpertId resident, ExpertId expert, Placement& out) {
        enter(expert, frame_of(resident), resident, out);
    }

    // Makes room for one absent expert outside any step (a prefetch). False if nothing may be
    // evicted.
    bool place(ExpertId expert, Placement& out);

    // Removes a resident whose read failed or whose frame is closed. It must not be pinned.
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
    // By frame; kNone is a free frame. Closed frames that are still occupied come last.
    [[nodiscard]] std::span<const ExpertId> residents() const noexcept {
        return {residents_.data(), residents_.size()};
    }
    [[nodiscard]] int32_t frames() const noexcept { return frames_; }
    [[nodiscard]] bool is_open(FrameId frame) const noexcept { return number(frame) < frames_; }

    [[nodiscard]] bool has_free_frame() const noexcept { return !free_frames_.empty(); }

    // The number of experts that can be placed now: free frames and residents that may be evicted.
    [[nodiscard]] int32_t room() const noexcept;

    // Opens free frames at the end, or closes frames from the end. Residents of closed frames are
    // evicted at once, but a pinned one stays until its owner has unpinned and removed it. No
    // expert enters a closed frame. Growing opens closed frames again.
    void resize(int32_t frames);
    // Exchanges the residents of two open frames.
    void exchange(FrameId frame, FrameId other);
    [[nodiscard]] int32_t occupied_closed_frames() const noexcept {
        return occupied_closed_frames_;
    }

    [[nodiscard]] Policy& policy() noexcept { return *policy_; }

private:
    void insert(std::span<const ExpertId> experts, bool by_shares, StepPlan& out);
    void enter(ExpertId expert, FrameId frame, ExpertId evicted, Placement& out);
    FrameId take_free_frame() noexcept;
    void drop_unused_closed_frames();

    std::unique_ptr<Policy> policy_;
    int32_t frames_ = 0;
    int32_t occupied_closed_frames_ = 0;
    PerExpert<FrameId> frame_of_;
    PerFrame<ExpertId> residents_;
    Pins pins_;
    PromptShares shares_;
    std::vector<FrameId> free_frames_;         // open ones; the next to use is last
    std::vector<ExpertId> missing_, victims_;  // scratch
};

}  // namespace moeinf
