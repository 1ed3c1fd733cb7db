// What the cache and its leases share; private to this room. Everything in CacheState is guarded by
// the lock of its tier, and each of its functions is called under that lock.
//
// A member of a step:
//
//                   its fill fails
//   kPending --> kLoading --------> kFailed: the step fails
//      |  |          | its fill completes
//      |  |          v
//      |  +-------> kReady --wait_ready--> kHeld --release(position)--> kDone
//      |   it is here
//      +-- no frame can keep it: it waits for a staging slot
//
// From kLoading to kHeld it pins its resident, or has claimed its staging slot.
#pragma once

#include <array>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/fork.h"
#include "cache/expert_cache.h"
#include "prefetch/prefetcher.h"
#include "tier/shared_segment.h"
#include "tier/tier.h"

namespace moeinf {

[[nodiscard]] inline double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

struct Member {
    enum class State : uint8_t { kPending, kLoading, kReady, kHeld, kDone, kFailed };

    [[nodiscard]] bool has_slot() const noexcept {
        return state == State::kLoading || state == State::kReady || state == State::kHeld;
    }

    ExpertId expert = ExpertId::kNone;
    SlotId slot = SlotId::kNone;
    int32_t staging = -1;  // index of its staging slot; -1: its slot is a resident's
    State state = State::kPending;
    FillPtr fill;  // kLoading only
};

struct StepLease::Impl {
    LayerId layer{0};
    std::vector<Member> members;
    size_t to_hand_out = 0;
    size_t pending = 0;               // members without a slot
    size_t next_pending = 0;          // no pending member comes before this one
    std::thread::id thread;           // that used the lease last
    int32_t waiting_for_staging = 0;  // threads in wait_ready() that only a staging slot can wake
    bool passes_on = false;           // frames of released members to other experts, see pass_on()
    ExpertId next_layer{0}, layer_end{0};  // experts of the next layer not considered yet
    bool released = false;
    std::string failure;      // of the first fill that failed
    size_t active_index = 0;  // in CacheState::active
};

struct CacheState final : Tier::Owner {
    CacheState(std::shared_ptr<const Catalog> catalog, ExpertCacheOptions options);

    // Takes no lock: what the lock guards may be torn in a forked child, where no thread of the
    // source exists either.
    [[nodiscard]] bool forked() const noexcept { return process.forked(); }
    void check_process() const;

    [[nodiscard]] const Catalog& catalog() const noexcept { return *tier.catalog(); }
    [[nodiscard]] LayerStats& stats_of(ExpertId expert) {
        return stats[catalog().shape().layer_of(expert)];
    }

    // Starts what has been noted. Called with the lock not held; wait() does it, too.
    void flush() const noexcept { tier.source().flush(); }
    void wait(std::unique_lock<std::mutex>& lock) { tier.wait(lock, poll); }

    void on_fill_started(const Fill& fill) override;
    void on_fill_ended(Fill& fill) override;
    void on_evicted(ExpertId expert) override;
    void on_arrival(ExpertId expert, Priority submitted);  // on a device; takes the lock

    bool prefetch(ExpertId expert, ExpertId& evicted);  // false: nothing may be evicted for it
    void start_prefetches();                            // what the prefetcher chooses

    // Members of a step.
    void fetch(StepLease::Impl& lease, Member& member, const Placement& placement);
    void join(StepLease::Impl& lease, Member& member);
    // During a long prompt those that the layer keeps come first, or last.
    [[nodiscard]] Member& next_pending(StepLease::Impl& lease, bool kept);
    // What the layer keeps waits for a frame that will be passed on; `of_held`: also for those of
    // members that their holder has not released.
    void start_surplus(StepLease::Impl& lease, bool of_held = false);
    [[nodiscard]] bool frames_to_come(const StepLease::Impl& lease, bool of_held) const;
    void collect_fills(StepLease::Impl& lease);
    void release_member(Member& member);
    // During a long prompt: the frame of a member that has been computed, and that its layer does
    // not keep, takes a pending member, or else an expert of the next layer.
    void pass_on(StepLease::Impl& lease, ExpertId computed);
    bool hand_out(StepLease::Impl& lease, std::vector<ReadyExpert>& out);
    void acquire_all(StepLease::Impl& lease, std::unique_lock<std::mutex>& lock);
    void end_lease(StepLease::Impl& lease);
    [[nodiscard]] bool staging_never_frees() const;
    [[nodiscard]] int32_t slots_held_by_this_thread(const StepLease::Impl* besides,
                                                    int32_t from) const;

    struct Seen {
        int64_t request = -1;
        int32_t position = -1;
    };

    const std::function<void()> poll;
    const ForkDetector process;
    std::unique_ptr<Prefetcher> prefetcher;  // null: no prefetch but what callers ask for
    PerLayer<LayerStats> stats;
    PerExpert<uint8_t> prefetched_unused;
    std::array<const StepLease::Impl*, ExpertCache::kStagingSlots> staging_users{};  // who claimed
    std::vector<StepLease::Impl*> active;                  // steps in progress
    std::vector<std::unique_ptr<StepLease::Impl>> unused;  // finished ones, for reuse
    int64_t steps = 0;
    int64_t requests = 0;
    PerExpert<Seen> seen;            // where the request of that number names it
    std::vector<ExpertId> flat_ids;  // scratch
    std::vector<int32_t> ones;       // scratch
    StepPlan plan;                   // scratch

    std::shared_ptr<SharedSegment> segment;  // null: the slots are this cache's own
    DeviceLink* link = nullptr;              // the tier's source, where slots lie on a device
    const FileReader* files = nullptr;       // what reads the files in the end
    Tier tier;                               // last: its threads use what is above
};

}  // namespace moeinf
