// A tier: a pool of slots, a map of the experts in them, the fills on their way there, and a source
// that fills them. A cache runs its steps on the tier in the fastest memory. HostTier makes a tier
// in RAM that serves the devices above it.
//
// A slot is a place in the pool. Residency knows frames, and the slot table gives the slot of each
// frame. Staging slots belong to no frame. An expert that no frame can keep passes through a
// staging slot. An expert is also filled into one while its victim is still being copied out of its
// slot:
//
//   before   frame 7 -> slot 9 (victim)      staging 0 -> slot 1 (free)
//   after    frame 7 -> slot 1 (new expert)  staging 0 -> slot 9 (victim, being copied out)
//
// Locks, in the order in which they are taken; a thread need not take all of them:
//   1. Source::issuing of a device's link, or of the files
//   2. Tier::mutex of the tier that this source fills
//   3. Tier::mutex of the RAM tier below a device's link
//   4. the queues of sources and of the file reader; the fences of slots, then timelines
// A thread that holds lock 1 of one source never takes lock 1 of another one: HostTier::flush,
// which starts reads and calls the links that wait, is called with no lock held.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "layout/catalog.h"
#include "memory/slot_pool.h"
#include "policy/residency.h"
#include "tier/fill.h"
#include "tier/source.h"

namespace moeinf {

class Tier {
public:
    // Is told of events. The first three functions are called under the tier's lock.
    class Owner {
    public:
        virtual ~Owner() = default;
        virtual void on_fill_started(const Fill& /*fill*/) {}
        // Called before pins and slots change. The tier holds the fill until this returns.
        virtual void on_fill_ended(Fill& /*fill*/) {}
        virtual void on_evicted(ExpertId /*expert*/) {}
        virtual void after_fill() noexcept {}  // with the lock released
    };

    // `own_slots`: there is a frame for each expert, and its slot is the same in every process.
    // Such a tier never evicts and is never resized.
    Tier(std::shared_ptr<const Catalog> catalog, std::shared_ptr<SlotPool> pool,
         std::unique_ptr<Policy> policy, int32_t frames, int32_t staging_slots, Owner& owner,
         bool own_slots = false);
    // Must be the first call.
    void connect(std::unique_ptr<Source> source) { source_ = std::move(source); }

    [[nodiscard]] const std::shared_ptr<const Catalog>& catalog() const noexcept {
        return catalog_;
    }
    [[nodiscard]] SlotPool& pool() const noexcept { return *pool_; }
    [[nodiscard]] const std::shared_ptr<SlotPool>& shared_pool() const noexcept { return pool_; }
    [[nodiscard]] Source& source() const noexcept { return *source_; }

    // Never held during a wait or while bytes move.
    mutable std::mutex mutex;
    std::condition_variable changed;  // a fill ended, or a staging slot or a pin was released

    // A source ends a fill. `error` is empty if the bytes are there. Takes the lock.
    void end_fill(Fill& fill, std::string error) noexcept;

    // Everything below is called under the lock.

    [[nodiscard]] Residency& residency() noexcept { return residency_; }
    [[nodiscard]] const Residency& residency() const noexcept { return residency_; }
    [[nodiscard]] const FillPtr& fill_of(ExpertId expert) const { return fills_[expert]; }
    [[nodiscard]] bool is_ready(ExpertId expert) const {
        return residency_.resident(expert) && fills_[expert] == nullptr;
    }
    [[nodiscard]] SlotId slot_of(ExpertId resident) const {
        if (own_slots_) return SlotId{slots_with(number(resident))};
        return slot_table_[residency_.frame_of(resident)];
    }
    [[nodiscard]] std::byte* address(ExpertId resident) const {
        return pool_->slot(slot_of(resident));
    }

    // Residents. The fill of a placed expert must start at once.
    void evict_for(const Placement& placement);
    const FillPtr& start_fill(ExpertId expert, Priority priority, bool from_above = false);
    // The source takes over a fill from above that was given up.
    void fill_from_source(const FillPtr& fill);
    // Pins the expert. Returns the fill that must end first, or null if the bytes are there.
    FillPtr join(ExpertId expert, bool demand) {
        residency_.pin(expert);
        const FillPtr& fill = fills_[expert];
        if (fill == nullptr) return nullptr;
        ++fill->waiting;
        if (demand) promote(fill);
        return fill;
    }
    void promote(const FillPtr& fill);
    void leave(ExpertId expert,
               const FillPtr& joined) {  // undoes join(); null: the bytes are there
        if (joined) --joined->waiting;
        unpin(expert);
    }
    void unpin(ExpertId expert) {
        residency_.unpin(expert);
        if (!residency_.pinned(expert)) on_unpinned(expert);
    }
    void end(Fill& fill, std::string error);

    // Staging slots, by index. A claimed one belongs to its claimer until it is released. A failed
    // fill releases it.
    [[nodiscard]] int32_t staging_slots() const { return static_cast<int32_t>(staging_.size()); }
    [[nodiscard]] std::optional<int32_t> claim_staging();
    [[nodiscard]] bool is_claimed(int32_t staging) const { return staging_at(staging).claimed; }
    FillPtr start_staged_fill(int32_t staging, ExpertId expert, Priority priority);
    void release_staging(int32_t staging, ExpertId expert);

    // Executes the noted commands if there are any; else waits for `changed` and calls `poll` about
    // every 50 ms. The lock is released meanwhile.
    void wait(std::unique_lock<std::mutex>& lock, const std::function<void()>& poll);

    // While one lives, every released pin is announced. Declare it after the lock.
    class RoomWatch {
    public:
        explicit RoomWatch(Tier& tier) : tier_(tier) { ++tier_.room_watches_; }
        RoomWatch(const RoomWatch&) = delete;
        RoomWatch& operator=(const RoomWatch&) = delete;
        ~RoomWatch() { --tier_.room_watches_; }

    private:
        Tier& tier_;
    };
    void announce_room() {
        if (room_watches_ > 0) changed.notify_all();
    }

    // Resizing, in this order: compact, then shrink or grow. The first frames get slots that stay.
    void compact(int32_t frames);
    // Closes frames. Waits until the slots that go are empty and no fill is on its way to them.
    void close_frames(std::unique_lock<std::mutex>& lock, int32_t frames,
                      const std::function<void()>& poll);
    void set_frames(int32_t frames) { residency_.resize(frames); }
    [[nodiscard]] int32_t slots_with(int32_t frames) const { return frames + staging_slots(); }
    bool resizing = false;

private:
    struct Staging {
        SlotId slot = SlotId::kNone;
        bool claimed = false;
        FillPtr fill;  // while it is filled
        [[nodiscard]] bool is_free() const noexcept { return !claimed && fill == nullptr; }
    };
    [[nodiscard]] const Staging& staging_at(int32_t staging) const {
        return staging_[static_cast<size_t>(staging)];
    }
    [[nodiscard]] Staging& staging_at(int32_t staging) {
        return staging_[static_cast<size_t>(staging)];
    }
    // True if the slot keeps its memory after the closed frames are removed.
    [[nodiscard]] bool stays(SlotId slot) const {
        return number(slot) < slots_with(residency_.frames());
    }
    void evict(ExpertId expert, SlotId slot);
    void on_bypassed(ExpertId expert);
    void on_unpinned(ExpertId expert) {
        if (!residency_.is_open(residency_.frame_of(expert))) leave_closed_frame(expert);
        announce_room();
    }
    void leave_closed_frame(ExpertId expert);
    [[nodiscard]] bool give_staging_slots_that_stay();

    const std::shared_ptr<const Catalog> catalog_;
    const std::shared_ptr<SlotPool> pool_;
    Owner& owner_;
    const bool own_slots_;
    Residency residency_;
    PerExpert<FillPtr> fills_;     // into residents' slots
    PerFrame<SlotId> slot_table_;  // of open and closed frames
    std::vector<Staging> staging_;
    size_t next_staging_ = 0;  // the staging slot that the next frame exchanges with
    int32_t room_watches_ = 0;
    std::unique_ptr<Source> source_;  // last: its threads use the members above
};

}  // namespace moeinf
