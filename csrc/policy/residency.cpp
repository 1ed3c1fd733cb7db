#include "policy/residency.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/error.h"

namespace moeinf {

Residency::Residency(ModelShape shape, int32_t frames, std::unique_ptr<Policy> policy)
    : policy_(std::move(policy)),
      frame_of_(shape.total(), FrameId::kNone),
      pins_(shape.total()),
      shares_(shape) {
    if (policy_ == nullptr) throw Error(ErrorCode::kInvalid, "residency needs a policy");
    resize(frames);
}

void Residency::plan(const Step& step, StepPlan& out) {
    policy_->observe(step);
    if (step.recent.empty()) {
        shares_.end();
        return insert(step.experts, out);
    }
    shares_.begin(step, frames_);
    insert(shares_.experts(), true, out);
}

void Residency::insert(std::span<const ExpertId> experts, StepPlan& out) {
    insert(experts, false, out);
}

void Residency::insert(std::span<const ExpertId> experts, bool by_shares, StepPlan& out) {
    out.hits.clear();
    out.placements.clear();
    out.surplus.clear();
    missing_.clear();
    for (const ExpertId expert : experts) {
        (resident(expert) ? out.hits : missing_).push_back(expert);
    }
    if (missing_.empty()) return;

    const size_t from_free = std::min(missing_.size(), free_frames_.size());
    size_t found = 0;
    if (from_free < missing_.size()) {
        for (const ExpertId expert : out.hits) pin(expert);
        victims_.resize(missing_.size() - from_free);
        found = by_shares ? shares_.choose_victims(*policy_, residents(), pins_, missing_, victims_)
                          : policy_->choose_victims(residents(), pins_, victims_);
        for (const ExpertId expert : out.hits) unpin(expert);
    }

    const size_t placed = from_free + found;
    out.placements.resize(placed);
    for (size_t i = 0; i < placed; ++i) {
        if (i < from_free) {
            enter(missing_[i], take_free_frame(), ExpertId::kNone, out.placements[i]);
        } else {
            const ExpertId victim = victims_[i - from_free];
            enter(missing_[i], frame_of(victim), victim, out.placements[i]);
        }
    }
    out.surplus.assign(missing_.begin() + static_cast<std::ptrdiff_t>(placed), missing_.end());
}

bool Residency::place(ExpertId expert, Placement& out) {
    if (has_free_frame()) {
        enter(expert, take_free_frame(), ExpertId::kNone, out);
        return true;
    }
    ExpertId victim = ExpertId::kNone;
    if (policy_->choose_victims(residents(), pins_, {&victim, 1}) == 0) return false;
    enter(expert, frame_of(victim), victim, out);
    return true;
}

FrameId Residency::take_free_frame() noexcept {
    const FrameId frame = free_frames_.back();
    free_frames_.pop_back();
    return frame;
}

void Residency::enter(ExpertId expert, FrameId frame, ExpertId evicted, Placement& out) {
    if (is_some(evicted)) {
        // A wrong victim would cause wrong weights later, so this check is worth a branch.
        if (!is_some(frame) || pinned(evicted)) {
            throw Error(ErrorCode::kInvalid, "policy '" + std::string(policy_->name()) +
                                                 "' named expert " +
                                                 std::to_string(number(evicted)) +
                                                 " as a victim, which is absent or pinned");
        }
        frame_of_[evicted] = FrameId::kNone;
        policy_->evicted(evicted);
    }
    frame_of_[expert] = frame;
    residents_[frame] = expert;
    policy_->inserted(expert);
    out = {expert, frame, evicted};
}

void Residency::remove(ExpertId expert) {
    const FrameId frame = frame_of(expert);
    frame_of_[expert] = FrameId::kNone;
    residents_[frame] = ExpertId::kNone;
    policy_->evicted(expert);
    if (is_open(frame)) {
        free_frames_.push_back(frame);
    } else {
        --occupied_closed_frames_;
        drop_unused_closed_frames();
    }
}

int32_t Residency::room() const noexcept {
    auto room = static_cast<int32_t>(free_frames_.size());
    for (const FrameId frame : all_ids<FrameId>(frames_)) {
        if (is_some(residents_[frame]) && !pinned(residents_[frame])) ++room;
    }
    return room;
}

void Residency::resize(int32_t frames) {
    if (frames < 1) {
        throw Error(ErrorCode::kInvalid,
                    "a cache needs at least 1 slot, not " + std::to_string(frames));
    }
    const int32_t before = std::exchange(frames_, frames);
    policy_->resized(frames);
    if (frames > before) {
        const auto known = static_cast<int32_t>(residents_.size());
        residents_.resize(std::max(known, frames), ExpertId::kNone);
        std::vector<FrameId> opened;
        for (const FrameId frame : IdRange<FrameId>(before, frames)) {
            if (is_some(residents_[frame])) {
                --occupied_closed_frames_;
            } else {
                opened.push_back(frame);
            }
        }
        // Low frames are used first, so a cache touches only the memory that it needs.
        free_frames_.insert(free_frames_.begin(), opened.rbegin(), opened.rend());
    } else {
        std::erase_if(free_frames_, [this](FrameId frame) { return !is_open(frame); });
        for (const FrameId frame : IdRange<FrameId>(frames, before)) {
            if (is_some(residents_[frame])) ++occupied_closed_frames_;
        }
        // The last resident of closed frames removes them from the end.
        for (FrameId frame{frames}; index(frame) < residents_.size();
             frame = FrameId{number(frame) + 1}) {
            const ExpertId expert = residents_[frame];
            if (is_some(expert) && !pinned(expert)) remove(expert);
        }
    }
    drop_unused_closed_frames();
}

void Residency::exchange(FrameId frame, FrameId other) {
    std::swap(residents_[frame], residents_[other]);
    for (const FrameId one : {frame, other}) {
        if (is_some(residents_[one])) frame_of_[residents_[one]] = one;
    }
    for (FrameId& free : free_frames_) {
        if (free == frame || free == other) free = free == frame ? other : frame;
    }
}

void Residency::drop_unused_closed_frames() {
    if (occupied_closed_frames_ == 0) residents_.resize(frames_, ExpertId::kNone);
}

}  // namespace moeinf
