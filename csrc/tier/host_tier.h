// A tier in page-locked RAM between the files and the devices. Its owner makes it. Any number of
// device links share it, so an expert is read and pinned in RAM once for all of them. A copy in
// either direction pins its expert, so the copied bytes cannot change.
//
// An expert in it:
//
//            pin, not here                     the read ends
//   absent ----------------> being read ------------------------> here, pinned by each waiter
//     |  \--- no slot: the waiter starves until a pin goes           | last unpin
//     |                                                              v
//     |  accept_demotion          demotion_enqueued                here, may be evicted
//     +------------------> coming --------------> here, its bytes behind a point of the link
//              abort_demotion: absent again, or being read if a waiter exists
//
// Thread-safe. All functions but flush() only note commands, and may be called with a link's
// issuing lock held. A flush() with no lock held must follow.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/fork.h"
#include "device/device.h"
#include "tier/file_source.h"
#include "tier/tier.h"

namespace moeinf {

struct HostTierOptions {
    int32_t slots = 0;  // at least kMinSlots are taken
    std::string policy = "learned";
    // Experts that a device holds too are evicted first. An expert that the last device evicts
    // comes back to this tier.
    bool exclusive = false;
    FileReaderOptions read;
    std::shared_ptr<const Collection> eamc;  // see ExpertCacheOptions
};

struct HostTierStats {
    int32_t slots = 0;
    int32_t slots_refused = 0;  // asked for, but the system refused to pin them
    int64_t hits = 0;           // of the experts asked for, in this tier
    int64_t misses = 0;
    int64_t read_bytes = 0;  // from files
    int64_t demoted = 0;     // experts accepted from a device
};

class HostTier final : private Tier::Owner {
public:
    static constexpr int32_t kMinSlots = 4;  // so reads and copies can overlap

    // `device` page-locks the memory for all devices of its driver. Takes fewer slots if the system
    // refuses pinned memory. Throws Error(kCapacity) for fewer than kMinSlots.
    static std::shared_ptr<HostTier> make(std::shared_ptr<const Catalog> catalog, Device& device,
                                          HostTierOptions options);
    ~HostTier() override;
    HostTier(const HostTier&) = delete;
    HostTier& operator=(const HostTier&) = delete;

    // Throws Error(kInvalid) unless the experts are those of the catalog, Error(kUnsupported) in a
    // forked child.
    void check_serves(const Catalog& catalog) const;

    // Pins the waiter's expert. Returns its place if it is in this tier; else on_pinned() is called
    // once.
    [[nodiscard]] std::optional<PinnedExpert> pin(FillWaiterPtr waiter, Priority priority);
    void promote(const FillWaiter& waiter);  // a step waits for its expert now
    void unpin(ExpertId expert);
    // Removes and returns all waiters of an owner whose on_pinned() has not been called or begun.
    [[nodiscard]] std::vector<FillWaiterPtr> withdraw(const void* owner);

    // A device holds the expert from now on, or no longer holds it.
    void add_holder(ExpertId expert);
    void remove_holder(ExpertId expert);

    // True if accept_demotion() would take the expert now. Only a hint: no lock is kept.
    [[nodiscard]] bool accepts_demotion(ExpertId expert) const;
    // A pinned place for the bytes of an expert that no device holds any more; null if this tier
    // does not want them. One of the next three calls must follow; end_demotion() also follows
    // demotion_enqueued().
    [[nodiscard]] std::byte* accept_demotion(ExpertId expert);
    void abort_demotion(ExpertId expert);  // nothing has been enqueued
    void demotion_enqueued(ExpertId expert, TimelinePtr timeline, uint64_t point);
    void end_demotion(ExpertId expert, bool arrived);

    void observe(const Step& step);

    // Starts reads and calls waiters. The caller holds no lock.
    void flush() noexcept;

    [[nodiscard]] HostTierStats stats() const;
    void reset_stats();
    [[nodiscard]] const FileReader& files() const noexcept { return files_->files(); }

private:
    struct Starving {  // no slot was free for it
        FillWaiterPtr waiter;
        Priority priority;
    };
    struct Told {
        FillWaiterPtr waiter;
        PinnedExpert pinned;
        std::string error;
    };
    struct Demotion {  // copies in flight
        ExpertId expert;
        TimelinePtr timeline;
        uint64_t point;
        bool lost;  // the copy did not end: its bytes must not be used
    };

    HostTier(std::shared_ptr<const Catalog> catalog, Device& device, HostTierOptions options);

    void on_fill_ended(Fill& fill) override;
    void after_fill() noexcept override;

    // Under the tier's lock.
    [[nodiscard]] PinnedExpert locate(ExpertId expert);
    [[nodiscard]] std::vector<Demotion>::iterator demotion_of(ExpertId expert);
    [[nodiscard]] bool make_room(ExpertId expert);
    void add_starving(FillWaiterPtr waiter, Priority priority);
    void wait_for_fill(FillWaiterPtr waiter, Priority priority);
    void drop_pin(ExpertId expert);
    void note_duplicate(ExpertId expert);
    void serve_starving();
    void tell(Told told);

    const bool exclusive_;
    const ForkDetector process_;
    bool holds_all_ = false;  // nobody ever leaves, so that no policy need look on
    // Guarded by the tier's lock, up to the next blank line.
    PerExpert<uint16_t> holders_;      // devices that hold it
    std::deque<ExpertId> duplicates_;  // candidates: here and on a device when noted
    std::deque<Starving> starving_;
    std::deque<Told> told_;  // by the next flush()
    std::vector<Demotion> demotions_;
    int64_t steps_ = 0;
    HostTierStats stats_;

    std::atomic<bool> has_told_{false};
    FileSource* files_ = nullptr;
    std::unique_ptr<Tier> tier_;  // last: its threads use what is above
};

}  // namespace moeinf
