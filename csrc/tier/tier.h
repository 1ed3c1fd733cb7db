// A tier: a pool of slots, which expert sits in which of them, what is on its way there, and a
// source that fills them. A cache runs its steps on the tier in the fastest memory; HostTier makes
// a tier in RAM serve the devices above it.
//
// A slot is a place in the pool. Residency deals in frames; the slot table says in which slot the
// expert of a frame lies. The staging slots belong to no frame: through them an expert passes that
// no frame can keep, and into one of them an expert is brought while the one that it replaces is
// still being copied out.
//
// Locks, in the order in which they are taken; each may be missing:
//   1. Source::issuing of a device's link, or of the files
//   2. Tier::mutex of the tier that this source fills
//   3. Tier::mutex of the RAM tier below a device's link
//   4. the queues of sources and of the file reader; the fences of slots, then timelines
// A thread that holds 1 of a link never takes 1 of another source: HostTier::flush, which reads
// files and calls the links that wait, is called with no lock held.
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
    // Told of what happens. The first three are called under the tier's lock.
    class Owner {
    public:
        virtual ~Owner() = default;
        virtual void on_fill_started(const Fill& /*fill*/) {}
        // Before pins and slots change; the tier holds the fill until this returns.
        virtual void on_fill_ended(Fill& /*fill*/) {}
        virtual void on_evicted(ExpertId /*expert*/) {}
        virtual void after_fill() noexcept {}  // with the lock released
    };

    Tier(std::shared_ptr<const Catalog> catalog, std::shared_ptr<SlotPool> pool,
         std::unique_ptr<Policy> policy, int32_t frames, int32_t staging_slots, Owner& owner);
    // Before anything else is called.
    void connect(std::unique_ptr<Source> source) { source_ = std::move(source); }

    [[nodiscard]] const std::shared_ptr<const Catalog>& catalog() const noexcept {
        return catalog_;
    }
    [[nodiscard]] SlotPool& pool() const noexcept { return *pool_; }
    [[nodiscard]] const std::shared_ptr<SlotPool>& shared_pool() const noexcept { return pool_; }
    [[nodiscard]] Source& source() const noexcept { return *source_; }

    // Never held while anything waits or bytes move.
    mutable std::mutex mutex;
    std::condition_variable changed;  // a fill ended, a staging slot or a pin was given back

    // A source says that a fill is over; `error` is empty if the bytes are there. Takes the lock.
    void end_fill(Fill& fill, std::string error) noexcept;

    // Everything below is called under the lock.

    [[nodiscard]] Residency& residency() noexcept { return residency_; }
    [[nodiscard]] const Residency& residency() const noexcept { return residency_; }
    [[nodiscard]] const FillPtr& fill_of(ExpertId expert) const { return fills_[expert]; }
    [[nodiscard]] bool is_ready(ExpertId expert) const {
        return residency_.resident(expert) && fills_[expert] == nullptr;
    }
    [[nodiscard]] SlotId slot_of(ExpertId resident) const {
        return slot_table_[residency_.frame_of(resident)];
    }
    [[nodiscard]] std::byte* address(ExpertId resident) const {
        return pool_->slot(slot_of(resident));
    }

    // Residents. An expert that has been placed is filled at once.
    void evict_for(const Placement& placement);
    const FillPtr& start_fill(ExpertId expert, Priority priority, bool from_above = false);
    // The source takes over a fill that nobody above makes any more.
    void fill_from_source(const FillPtr& fill);
    // Pins it. Returns the fill that has to end first; null if its bytes are there.
    FillPtr join(ExpertId expert, bool demand);
    void promote(const FillPtr& fill);
    void leave(ExpertId expert, const FillPtr& joined);  // the opposite; null: its bytes are there
    void unpin(ExpertId expert);
    void end(Fill& fill, std::string error);

    // Staging slots, by index. A claimed one is its claimer's until released; a fill that fails
    // releases it.
    [[nodiscard]] int32_t staging_slots() const { return static_cast<int32_t>(staging_.size()); }
    [[nodiscard]] std::optional<int32_t> claim_staging();
    [[nodiscard]] bool is_claimed(int32_t staging) const { return staging_at(staging).claimed; }
    FillPtr start_staged_fill(int32_t staging, ExpertId expert, Priority priority);
    void release_staging(int32_t staging, ExpertId expert);

    // Releases the lock, waits for `changed` and takes it again; carries out what has been noted.
    // Calls `poll` about every 50 ms, with the lock released.
    void wait(std::unique_lock<std::mutex>& lock, const std::function<void()>& poll);

    // While one lives, every pin given back is announced. Goes after the lock.
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
    // Closes frames, and waits until nothing is left in or on its way to slots that go.
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
    // Does the slot keep its memory when the frames that are closed now go?
    [[nodiscard]] bool stays(SlotId slot) const {
        return number(slot) < slots_with(residency_.frames());
    }
    void evict(ExpertId expert, SlotId slot);
    void on_bypassed(ExpertId expert);
    [[nodiscard]] bool give_staging_slots_that_stay();

    const std::shared_ptr<const Catalog> catalog_;
    const std::shared_ptr<SlotPool> pool_;
    Owner& owner_;
    Residency residency_;
    PerExpert<FillPtr> fills_;     // into residents' slots
    PerFrame<SlotId> slot_table_;  // of open and closed frames
    std::vector<Staging> staging_;
    size_t next_staging_ = 0;  // whose slot a frame gets next
    int32_t room_watches_ = 0;
    std::unique_ptr<Source> source_;  // last: its threads use what is above
};

}  // namespace moeinf
