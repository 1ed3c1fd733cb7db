// The pinned RAM between the files and a device: experts wait here for their copy, and stay as long
// as there is room. Every copy in either direction holds its expert, so that the bytes under it
// cannot change. Thread-safe; callbacks come with no lock held.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "device/device.h"
#include "layout/catalog.h"
#include "memory/slot_pool.h"
#include "policy/residency.h"
#include "transfer/file_reader.h"

namespace moeinf {

struct HostTierOptions {
    int32_t slots = 0;  // at least kMinSlots are taken
    std::string policy = "learned";
    // What also sits on the device goes first, and what leaves the device comes here.
    bool exclusive = false;
    FileReaderOptions copy;
    std::shared_ptr<const Collection> eamc;  // see ExpertCacheOptions
};

struct HostTierStats {
    int32_t slots = 0;
    int32_t slots_refused = 0;  // asked for, but not to be had as pinned memory
    int64_t hits = 0;           // experts asked for that were here
    int64_t misses = 0;
    int64_t read_bytes = 0;  // from files
    int64_t demoted = 0;     // experts taken over from the device
};

class HostTier {
public:
    static constexpr int32_t kMinSlots = 4;  // staging: reads and copies overlap

    // What a transfer waited for: the bytes, or what went wrong. Never both.
    using Ready =
        std::function<void(const TransferPtr& who, std::byte* bytes, const std::string& error)>;

    // Takes fewer slots where pinned memory is refused. Throws Error(kCapacity) if not even
    // kMinSlots can be had.
    HostTier(std::shared_ptr<const Catalog> catalog, Device& device, HostTierOptions options,
             Ready ready);
    ~HostTier();
    HostTier(const HostTier&) = delete;
    HostTier& operator=(const HostTier&) = delete;

    // Holds `who`'s expert until release(). Returns its bytes if they are here; else null, and
    // Ready is called from another thread, once, when they are. A failed one is not held.
    [[nodiscard]] std::byte* hold(const TransferPtr& who, Priority priority);
    void promote(ExpertId expert);  // someone waits for it now
    void release(ExpertId expert);

    // Room for an expert that leaves the device, held; null if it is here already, if there is no
    // room, or if this tier is not exclusive. drop() instead of release() if the copy failed.
    [[nodiscard]] std::byte* take_over(ExpertId expert);
    void drop(ExpertId expert);

    // Is what take_over() would be asked for missing here? It may yet change.
    [[nodiscard]] bool wants(ExpertId expert) const;

    void set_on_device(ExpertId expert, bool there);
    void observe(const Step& step);

    [[nodiscard]] HostTierStats stats() const;
    void reset_stats();
    [[nodiscard]] const FileReader& files() const noexcept { return *engine_; }

private:
    struct Waiter {
        TransferPtr who;
        Priority priority;
    };
    struct Entry {
        TransferPtr reading;               // null: the bytes are here, or it has no slot
        std::vector<TransferPtr> waiting;  // for that read; each holds the expert
        bool on_device = false;
    };

    [[nodiscard]] std::byte* address(ExpertId expert) const;
    [[nodiscard]] bool make_room(ExpertId expert);
    void note_duplicate(ExpertId expert);
    void start_read(ExpertId expert, Priority priority);
    void serve_starved();
    void on_read(ExpertId expert, const Transfer& transfer);

    const std::shared_ptr<const Catalog> catalog_;
    const bool exclusive_;
    const Ready ready_;
    bool full_house_ = false;  // a slot for each expert: nobody ever leaves, no policy need look on
    mutable std::mutex mutex_;  // guards all below; after the cache's lock, before the engine's
    std::unique_ptr<SlotPool> pool_;
    std::unique_ptr<Residency> residency_;
    PerExpert<Entry> entries_;
    std::deque<ExpertId> duplicates_;  // candidates: here and on the device when noted
    std::deque<Waiter> starved_;       // all slots were held
    HostTierStats stats_;
    bool ending_ = false;
    std::unique_ptr<FileReader> engine_;  // last: its threads use what is above
};

}  // namespace moeinf
