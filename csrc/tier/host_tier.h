// A tier in page-locked RAM between the files and the devices. Its owner makes it; any number of
// device links share it, so that an expert is read and pinned in RAM once for all of them. Every
// copy in either direction pins its expert, so that the bytes under it cannot change.
//
// An expert in it:
//
//            pin, not here                     the read ends
//   absent ----------------> being read ------------------------> here, pinned by each waiter
//     |  \--- no slot: the waiter starves until a pin goes           | last unpin
//     |                                                              v
//     |  accept_demotion          demotion_enqueued                here, may be evicted
//     +------------------> coming --------------> here, its bytes behind a point of the link
//              abort_demotion: absent again; or being read, if someone waits
//
// Thread-safe. Every function but flush() only takes note and may be called with a link's issuing
// lock held; it is followed by a flush() with no lock held.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "device/device.h"
#include "tier/file_source.h"
#include "tier/tier.h"

namespace moeinf {

struct HostTierOptions {
    int32_t slots = 0;  // at least kMinSlots are taken
    std::string policy = "learned";
    // An expert that a device holds too is evicted first, and one that the last device evicts comes
    // here.
    bool exclusive = false;
    FileReaderOptions read;
    std::shared_ptr<const Eamc> eamc;  // see ExpertCacheOptions
};

struct HostTierStats {
    int32_t slots = 0;
    int32_t slots_refused = 0;  // asked for, but not to be had as pinned memory
    int64_t hits = 0;           // experts asked for that were here
    int64_t misses = 0;
    int64_t read_bytes = 0;  // from files
    int64_t demoted = 0;     // experts accepted from a device
};

class HostTier final : private Tier::Owner {
public:
    static constexpr int32_t kMinSlots = 4;  // reads and copies overlap

    // `device` page-locks the memory, for every device of its driver. Takes fewer slots where
    // pinned memory is refused. Throws Error(kCapacity) if not even kMinSlots can be had.
    static std::shared_ptr<HostTier> make(std::shared_ptr<const Catalog> catalog, Device& device,
                                          HostTierOptions options);
    ~HostTier() override;
    HostTier(const HostTier&) = delete;
    HostTier& operator=(const HostTier&) = delete;

    // Throws Error(kInvalid) unless the experts are those of the catalog, Error(kUnsupported) in a
    // forked child.
    void check_serves(const Catalog& catalog) const;

    // Pins the waiter's expert. Returns where it is if it is here; else the waiter is told, once.
    [[nodiscard]] std::optional<PinnedExpert> pin(FillWaiterPtr waiter, Priority priority);
    void promote(const FillWaiter& waiter);  // a step waits for it now
    void unpin(ExpertId expert);
    // All waiters of an owner that have not been told, nor are being told now. They will not be.
    [[nodiscard]] std::vector<FillWaiterPtr> withdraw(const void* owner);

    // A device holds the expert from now on, or does no more.
    void add_holder(ExpertId expert);
    void remove_holder(ExpertId expert);

    // Would an expert that its only holder evicts be taken? It may yet change.
    [[nodiscard]] bool accepts_demotion(ExpertId expert) const;
    // Where the bytes of an expert that no device holds any more may be copied to, pinned; null if
    // they are not wanted. One of the next three follows; end_demotion also follows the second.
    [[nodiscard]] std::byte* accept_demotion(ExpertId expert);
    void abort_demotion(ExpertId expert);  // nothing has been enqueued
    void demotion_enqueued(ExpertId expert, TimelinePtr timeline, uint64_t point);
    void end_demotion(ExpertId expert, bool arrived);

    void observe(const Step& step);

    // Starts reads, and tells waiters. No lock may be held.
    void flush() noexcept;

    [[nodiscard]] HostTierStats stats() const;
    void reset_stats();
    [[nodiscard]] const FileReader& files() const noexcept { return files_->files(); }

private:
    struct Starving {  // no slot could be had for it
        FillWaiterPtr waiter;
        Priority priority;
    };
    struct Told {
        FillWaiterPtr waiter;
        PinnedExpert pinned;
        std::string error;
    };
    struct Demotion {  // copies under way
        ExpertId expert;
        TimelinePtr timeline;
        uint64_t point;
        bool lost;  // the copy never ended: the bytes may not be used
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
    const int64_t generation_;
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
