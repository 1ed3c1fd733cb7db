// The cache: steps on the tier in the fastest memory. Callers ask for the experts of a step and get
// them as they become ready; a slot they hold is never evicted or overwritten. Thread-safe. It
// never computes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/ids.h"
#include "device/device.h"
#include "layout/catalog.h"
#include "memory/slot_pool.h"
#include "policy/eam.h"
#include "prefetch/prefetcher.h"
#include "transfer/file_reader.h"

namespace moeinf {

// Bytes are counted when a read has ended well, uses and evictions when they happen.
struct LayerStats {
    int64_t accesses = 0;   // distinct experts asked for, summed over steps
    int64_t hits = 0;       // of these, completely there before the step
    int64_t misses = 0;     // the others, those that a prefetch was still reading included
    int64_t evictions = 0;  // experts of this layer that left for another or with their slot
    int64_t demand_bytes = 0;
    int64_t prefetch_bytes = 0;
    int64_t prefetch_useful_bytes = 0;  // prefetched and used before leaving
    int64_t prefetch_wasted_bytes = 0;  // prefetched and evicted unused
    double stall_seconds = 0;           // a step waited with nothing ready to compute
};

struct StepRequest {
    LayerId layer{0};
    std::span<const ExpertIndex> experts = {};  // distinct
    std::span<const int32_t> counts = {};       // tokens routed to each; empty: one each
    bool prefill = false;
    bool new_sequence = false;
    int64_t caller = 0;  // see Step
    // acquire_all() will follow: experts wait for slots rather than pass through.
    bool all_at_once = false;
};

struct ReadyExpert {
    int32_t position;  // index into StepRequest::experts
    SlotId slot;
};

class DeviceLink;
class HostTier;
class ExpertCache;
struct CacheState;  // in cache_state.h

// One step in progress. Hands out experts as they become ready (hits first, then misses as their
// reads finish, then those that only pass through), each exactly once and each held until released.
// Destroying it releases everything, reads in flight included.
//
// Where a step needs more experts than slots can hold, the surplus passes through two staging slots
// that all steps share: wait_ready() reads one there once another has been released. What stays
// resident is therefore what the counting rules say, whatever the order of computing.
class [[nodiscard]] StepLease {
public:
    // Waits until at least one expert is ready and appends all that are to `out`. False when every
    // expert has been handed out. Throws Error(kRead) if a read of this step failed, now and at
    // every later call; Error(kCapacity) if only leases of waiting threads, this one included, hold
    // the staging slots, so that waiting could never end.
    bool wait_ready(std::vector<ReadyExpert>& out);

    // The slot of that position, once handed out, may be reused from now on.
    void release(int32_t position);

    // Everything at once, in the order of positions, before any wait_ready(): waits for reads, and
    // for other threads' leases where they leave too few slots. Error(kCapacity) if the step needs
    // more slots than there are besides those that this thread's other leases hold.
    void acquire_all(std::vector<ReadyExpert>& out);

    // Ends the step early: all slots may be reused. Every later call but this throws.
    void release() noexcept;

    StepLease(StepLease&&) noexcept;
    StepLease& operator=(StepLease&&) = delete;
    ~StepLease();

    struct Impl;  // in cache_state.h

private:
    friend class ExpertCache;
    explicit StepLease(std::shared_ptr<CacheState> cache);
    std::shared_ptr<CacheState> cache_;
    std::unique_ptr<Impl> impl_;
};

struct ExpertCacheOptions {
    int32_t slots = 0;
    std::string policy = "learned";
    std::string prefetch = "off";  // one of prefetch_names()
    FileReaderOptions copy;
    // What "eam", as policy or prefetch, starts from; null: nothing. Not kept.
    std::shared_ptr<const Eamc> eamc;

    // With a device the slots lie in its memory, filled from pinned RAM, filled from the files.
    std::shared_ptr<Device> device;
    // The pinned RAM, shared with other caches on the same experts; null: one of this cache's own,
    // made of the two below and of the policy above.
    std::shared_ptr<HostTier> host_tier;
    int32_t host_slots = 0;
    bool exclusive = false;   // see HostTierOptions
    size_t gather_below = 0;  // see DeviceLink

    // Called about every 50 ms by a thread that waits, with no lock held. An exception thrown here
    // ends the wait (so does Python's Ctrl-C) and leaves the cache as it should be.
    std::function<void()> poll;
};

class ExpertCache {
public:
    // Slots of the pool beside those of residents: where surplus experts pass through, and where an
    // expert is brought while the one it replaces is copied out.
    static constexpr int32_t kStagingSlots = 2;

    // Throws Error(kInvalid) unless 1 <= slots <= experts in the catalog, and for a collection of
    // another shape or that nothing would use.
    ExpertCache(std::shared_ptr<const Catalog> catalog, ExpertCacheOptions options);

    // Leases may outlive the cache.
    ~ExpertCache();
    ExpertCache(const ExpertCache&) = delete;
    ExpertCache& operator=(const ExpertCache&) = delete;

    // Starts a step: pins its hits, places its misses and starts their reads. Never waits. Throws
    // Error(kInvalid), and counts nothing, for a layer or expert out of range or named twice.
    StepLease begin_step(const StepRequest& request);

    // Starts reading what is absent, best first, where a slot may be had for it. Returns how many
    // reads it started. Never waits.
    int32_t prefetch(LayerId layer, std::span<const ExpertIndex> experts);

    // A prediction of what the next step of `layer` will use, best first. The prefetcher decides
    // what becomes of it, and when: never before the step of the layer
    // before has its reads. Ignored where prefetch is "off".
    void predict(LayerId layer, std::span<const ExpertIndex> experts);
    // Is one worth making now? Only "external" ever wants them, and only while decoding.
    [[nodiscard]] bool wants_predictions() const;

    // Experts in slots that go leave the cache; shrinking waits for leases on those slots and
    // throws Error(kCapacity) if this thread's own leases hold them. Growing throws
    // Error(kCapacity) if the memory cannot be had. Either way the cache then keeps its size.
    void resize(int32_t slots);

    // What the policy is told of the experts to come, in [0, 1] by flat id; see Policy::set_priors.
    // Throws Error(kInvalid) unless there is one for each expert.
    void set_priors(std::span<const float> priors);

    // What "eam" has collected, as if the request in progress ended now; a copy, made under the
    // lock. Throws Error(kInvalid) where neither policy nor prefetch is "eam".
    [[nodiscard]] Eamc eamc() const;

    void reset_stats();
    [[nodiscard]] PerLayer<LayerStats> stats() const;
    [[nodiscard]] PredictionStats prediction_stats() const;
    [[nodiscard]] std::vector<ExpertIndex> resident(LayerId layer) const;  // whose bytes are there
    [[nodiscard]] int32_t slots() const;

    // Of the first kStagingSlots + slots() slots two are for staging, the others hold residents.
    // Slots beyond may not be touched. The address stays the same across resizes.
    [[nodiscard]] const SlotPool& pool() const noexcept;
    [[nodiscard]] std::shared_ptr<const SlotPool> shared_pool() const noexcept;
    [[nodiscard]] const Catalog& catalog() const noexcept;
    [[nodiscard]] std::string policy() const;
    [[nodiscard]] const FileReader& files() const noexcept;

    // Null where slots lie in RAM.
    [[nodiscard]] DeviceLink* device_link() const noexcept;

private:
    std::shared_ptr<CacheState> state_;
};

}  // namespace moeinf
