#include "tier/tier.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

namespace moeinf {
namespace {

constexpr std::chrono::milliseconds kPollEvery{50};
constexpr std::chrono::microseconds kPollIdle{100};

}  // namespace

Tier::Tier(std::shared_ptr<const Catalog> catalog, std::shared_ptr<SlotPool> pool,
           std::unique_ptr<Policy> policy, int32_t frames, int32_t staging_slots, Owner& owner,
           bool own_slots)
    : catalog_(std::move(catalog)),
      pool_(std::move(pool)),
      owner_(owner),
      own_slots_(own_slots),
      residency_(catalog_->shape(), frames, std::move(policy)),
      fills_(catalog_->total_experts()),
      slot_table_(catalog_->total_experts()),
      staging_(static_cast<size_t>(staging_slots)) {
    int32_t next = 0;
    for (Staging& staging : staging_) staging.slot = SlotId{next++};
    for (SlotId& slot : slot_table_) slot = SlotId{next++};
}

void Tier::evict_for(const Placement& placement) {
    if (!is_some(placement.evicted)) return;
    SlotId& slot = slot_table_[placement.frame];
    evict(placement.evicted, slot);
    if (staging_.empty() || resizing || !source_->accepts_demotion(placement.evicted)) return;
    // The frame takes the slot of a free staging slot, so its fill need not wait for the copy out
    // of the old slot. The old slot becomes the staging slot, and the next fill of it will wait.
    // Staging slots take turns (round-robin), so the old slot is used again as late as possible.
    for (size_t i = 0; i < staging_.size(); ++i) {
        Staging& spare = staging_[next_staging_++ % staging_.size()];
        if (spare.is_free()) return std::swap(slot, spare.slot);
    }
}

void Tier::evict(ExpertId expert, SlotId slot) {
    source_->on_evict(expert, slot);
    owner_.on_evicted(expert);
}

const FillPtr& Tier::start_fill(ExpertId expert, Priority priority, bool from_above) {
    FillPtr& fill = fills_[expert] = std::make_shared<Fill>();
    fill->expert = expert;
    fill->slot = slot_of(expert);
    fill->priority = priority;
    fill->from_above = from_above;
    residency_.pin(expert);
    owner_.on_fill_started(*fill);
    if (!from_above) source_->fill(fill);
    return fill;
}

void Tier::fill_from_source(const FillPtr& fill) {
    fill->from_above = false;
    source_->fill(fill);
}

FillPtr Tier::start_staged_fill(int32_t staging, ExpertId expert, Priority priority) {
    auto fill = std::make_shared<Fill>();
    fill->expert = expert;
    fill->slot = staging_at(staging).slot;
    fill->staging = staging;
    fill->priority = priority;
    staging_at(staging).fill = fill;
    owner_.on_fill_started(*fill);
    source_->fill(fill);
    return fill;
}

void Tier::promote(const FillPtr& fill) {
    if (fill->priority == Priority::kPrefetch && !fill->demanded) source_->promote(fill);
    fill->demanded = true;
}

void Tier::leave_closed_frame(ExpertId expert) {
    evict(expert, SlotId::kNone);
    residency_.remove(expert);
}

void Tier::end_fill(Fill& fill, std::string error) noexcept {
    {
        const std::lock_guard lock(mutex);
        end(fill, std::move(error));
    }
    owner_.after_fill();
}

void Tier::end(Fill& fill, std::string error) {
    const bool complete = error.empty();
    const FillPtr keep =
        std::move(fill.staging >= 0 ? staging_at(fill.staging).fill : fills_[fill.expert]);
    fill.state = complete ? Fill::State::kComplete : Fill::State::kFailed;
    fill.error = std::move(error);
    owner_.on_fill_ended(fill);
    if (fill.staging >= 0) {
        Staging& staging = staging_at(fill.staging);
        if (!complete) staging.claimed = false;
        if (complete && !staging.claimed) on_bypassed(fill.expert);
    } else if (complete) {
        unpin(fill.expert);
    } else {
        // Waiters see the failure in the fill. Their pins end here.
        for (uint32_t pins = fill.waiting + 1; pins > 0; --pins) residency_.unpin(fill.expert);
        residency_.remove(fill.expert);
    }
    changed.notify_all();
}

std::optional<int32_t> Tier::claim_staging() {
    // A slot that goes gets no new expert, unless all slots that stay belong to frames that are not
    // empty yet.
    const auto usable = [&](const Staging& staging) {
        return staging.is_free() &&
               (stays(staging.slot) || residency_.occupied_closed_frames() > 0);
    };
    const auto found = std::find_if(staging_.begin(), staging_.end(), usable);
    if (found == staging_.end()) return std::nullopt;
    found->claimed = true;
    return static_cast<int32_t>(found - staging_.begin());
}

void Tier::release_staging(int32_t staging, ExpertId expert) {
    staging_at(staging).claimed = false;
    if (staging_at(staging).fill == nullptr) on_bypassed(expert);
    changed.notify_all();
}

// The expert has passed through a staging slot, which may hold another expert from now on.
void Tier::on_bypassed(ExpertId expert) {
    if (!residency_.resident(expert)) source_->on_evict(expert, SlotId::kNone);
}

void Tier::wait(std::unique_lock<std::mutex>& lock, const std::function<void()>& poll) {
    if (source_->has_commands()) {  // the wait may be for a fill that starts only now
        lock.unlock();
        source_->flush();
        lock.lock();
        return;
    }
    if (!poll) return changed.wait(lock);
    if (changed.wait_for(lock, kPollEvery) == std::cv_status::no_timeout) return;
    lock.unlock();
    try {
        poll();
    } catch (...) {
        lock.lock();
        throw;
    }
    lock.lock();
}

void Tier::compact(int32_t frames) {
    const SlotId end{slots_with(frames)};
    int32_t other = frames;
    for (const FrameId frame : all_ids<FrameId>(frames)) {
        if (slot_table_[frame] < end) continue;
        while (slot_table_[FrameId{other}] >= end) ++other;
        residency_.exchange(frame, FrameId{other});
        std::swap(slot_table_[frame], slot_table_[FrameId{other}]);
    }
}

void Tier::close_frames(std::unique_lock<std::mutex>& lock, int32_t frames,
                        const std::function<void()>& poll) {
    for (const ExpertId expert : residency_.residents().subspan(static_cast<size_t>(frames))) {
        if (is_some(expert) && !residency_.pinned(expert)) evict(expert, SlotId::kNone);
    }
    residency_.resize(frames);
    {
        const RoomWatch watch(*this);
        while (residency_.occupied_closed_frames() > 0 || !give_staging_slots_that_stay()) {
            wait(lock, poll);
        }
    }
    while (!source_->is_idle(SlotId{slots_with(frames)})) {
        lock.unlock();
        source_->flush();
        if (poll) poll();
        std::this_thread::sleep_for(kPollIdle);
        lock.lock();
    }
}

// False while a staging slot is in use whose memory will be released.
bool Tier::give_staging_slots_that_stay() {
    bool all = true;
    const auto closed = slot_table_.begin() + residency_.frames();
    for (Staging& staging : staging_) {
        if (stays(staging.slot)) continue;
        if (!staging.is_free()) {
            all = false;
            continue;
        }
        // The closed frames are empty. They have as many slots that stay as there are staging slots
        // that go.
        std::swap(staging.slot, *std::find_if(closed, slot_table_.end(),
                                              [&](SlotId slot) { return stays(slot); }));
        changed.notify_all();
    }
    // Gives the slots that go to closed frames, in the order in which their memory will return.
    if (all) {
        int32_t next = slots_with(residency_.frames());
        for (auto slot = closed; slot != slot_table_.end(); ++slot) *slot = SlotId{next++};
    }
    return all;
}

}  // namespace moeinf
