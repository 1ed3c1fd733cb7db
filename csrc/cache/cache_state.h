// What the cache and its leases share; private to this room. CacheState is everything under the
// cache's one lock: each of its functions wants `mutex` held unless it says otherwise.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "base/fork.h"
#include "cache/expert_cache.h"
#include "policy/residency.h"
#include "prefetch/prefetcher.h"
#include "tier/device_transport.h"

namespace moeinf {

[[nodiscard]] inline double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// One expert on its way into one slot.
struct Load {
    enum class State : uint8_t { kReading, kComplete, kFailed };

    ExpertId expert = ExpertId::kNone;
    int32_t transit = -1;  // index of its transit slot; -1: its frame is a resident's
    bool prefetch = false;
    bool wanted = false;   // a step asked for it
    uint32_t waiting = 0;  // members that pin the expert until this ends
    State state = State::kReading;
    TransferPtr transfer;
    std::string error;
};

// One expert of a step. Until it is done it pins its resident, or owns its transit slot.
struct Member {
    enum class State : uint8_t { kPending, kLoading, kReady, kHeld, kDone, kFailed };

    ExpertId expert = ExpertId::kNone;
    SlotId slot = SlotId::kNone;
    int32_t transit = -1;
    State state = State::kPending;
    std::shared_ptr<Load> load;  // kLoading only
};

struct StepLease::Impl {
    LayerId layer{0};
    std::vector<Member> members;
    size_t to_hand_out = 0;
    size_t pending = 0;               // members without a slot
    size_t next_pending = 0;          // no pending member comes before this one
    std::thread::id thread;           // that used the lease last
    int32_t waiting_for_transit = 0;  // threads in next() that only a transit slot can wake
    bool released = false;
    std::string failure;      // of the first read that failed
    size_t active_index = 0;  // in CacheState::active
};

// Counts a thread in while it waits. Goes after the lock it needs.
class Waiting {
public:
    explicit Waiting(int32_t& count) : count_(count) { ++count_; }
    Waiting(const Waiting&) = delete;
    Waiting& operator=(const Waiting&) = delete;
    ~Waiting() { --count_; }

private:
    int32_t& count_;
};

struct CacheState {
    CacheState(std::shared_ptr<const Catalog> the_catalog, ExpertCacheOptions options);

    // Takes no lock: what the lock guards may be torn in a forked child, where no thread of the
    // copy engine exists either.
    [[nodiscard]] bool forked() const noexcept { return process.forked(); }
    void check_process() const;

    [[nodiscard]] LayerStats& stats_of(ExpertId expert) {
        return stats[catalog->shape().layer_of(expert)];
    }
    [[nodiscard]] SlotId slot_of(ExpertId resident) const {
        return slot_table[residency.frame_of(resident)];
    }

    // Starts what the transport has taken note of. Wants the lock not held; wait() does it, too.
    void flush() const noexcept { transport->flush(); }

    // Releases the lock, waits for `changed` and takes it again; calls `poll` every 50 ms.
    void wait(std::unique_lock<std::mutex>& lock);

    // Reads. The first also for a transit slot; the last two are callbacks of the transport and
    // take the lock themselves.
    std::shared_ptr<Load> start_load(ExpertId expert, int32_t transit, Priority priority);
    void end_load(Load& load, Load::State state, std::string error);
    void on_transfer_end(Load& load, const Transfer& transfer);
    void on_arrival(ExpertId expert, Priority submitted);  // on a device

    void start_prefetches();  // what the prefetcher chooses

    // Residents.
    // The slot that is filled anew; kNone: it goes.
    void leaves(ExpertId expert, SlotId slot = SlotId::kNone);
    void make_way(const Placement& placement);
    void passed(ExpertId expert);  // through a transit slot, of which it has let go
    void unpin(ExpertId expert);

    // Members of a step.
    void fetch(StepLease::Impl& lease, Member& member, const Placement& placement);
    void join(StepLease::Impl& lease, Member& member);
    void start_surplus(StepLease::Impl& lease);
    void settle(StepLease::Impl& lease);
    void let_go(Member& member);
    void hand_out(StepLease::Impl& lease, std::vector<ReadyExpert>& out);
    void gather(StepLease::Impl& lease, std::unique_lock<std::mutex>& lock);
    void end_lease(StepLease::Impl& lease);
    [[nodiscard]] bool transit_never_frees() const;
    [[nodiscard]] int32_t slots_held_by_this_thread(const StepLease::Impl* besides,
                                                    int32_t from) const;

    // Shrinking: the first so many frames get slots that stay, before the others are closed; then
    // transits do. False while one is in use.
    void gather_slots(int32_t frames);
    [[nodiscard]] bool transit_has_slots_that_stay();
    [[nodiscard]] bool stays(SlotId slot) const {
        return number(slot) < residency.frames() + ExpertCache::kTransitSlots;
    }

    struct Seen {
        int64_t request = -1;
        int32_t position = -1;
    };
    struct Transit {
        SlotId slot = SlotId::kNone;
        const StepLease::Impl* owner = nullptr;
        std::shared_ptr<Load> load;  // while it is filled
        [[nodiscard]] bool free() const noexcept { return owner == nullptr && load == nullptr; }
    };

    const std::shared_ptr<const Catalog> catalog;
    const std::shared_ptr<SlotPool> pool;
    const std::function<void()> poll;
    const ForkDetector process;

    mutable std::mutex mutex;  // guards all below; never held while anything waits or bytes move
    std::condition_variable changed;  // a read ended, a transit slot or a pin was given back
    Residency residency;
    std::unique_ptr<Prefetcher> prefetcher;  // null: no prefetch but what callers ask for
    PerLayer<LayerStats> stats;
    PerExpert<std::shared_ptr<Load>> loads;  // reads into residents' slots
    PerExpert<uint8_t> prefetched_unused;
    std::array<Transit, ExpertCache::kTransitSlots> transit;
    size_t next_spare = 0;                 // in transit: whose slot a resident gets next
    PerFrame<SlotId> slot_table;           // of frames, open or not; see make_way()
    std::vector<StepLease::Impl*> active;  // steps in progress
    std::vector<std::unique_ptr<StepLease::Impl>> unused;  // finished ones, for reuse
    int32_t waiting_for_room = 0;  // threads that want to hear of every pin given back
    bool resizing = false;
    int64_t steps = 0;
    int64_t requests = 0;
    PerExpert<Seen> seen;            // where the request of that number names it
    std::vector<ExpertId> flat_ids;  // scratch
    std::vector<int32_t> ones;       // scratch
    StepPlan plan;                   // scratch

    std::unique_ptr<Transport> transport;  // last: its threads use what is above
    DeviceTransport* on_device = nullptr;  // the same, where slots lie on a device
};

}  // namespace moeinf
