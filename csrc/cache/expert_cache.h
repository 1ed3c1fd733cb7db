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
    std::span<const float> recent = {};         // of a long prompt, with counts: see Step
    bool prefill = false;
    bool new_sequence = false;
    int64_t caller = 0;  // see Step
    // Of a long prompt: while it computes, the slots that no layer keeps take the experts of the
    // next layer. Only where slots lie in RAM.
    bool reads_ahead = false;
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

// One step in progress. It hands out experts as they become ready: hits first, then misses when
// their reads end, then experts that only pass through. Each is handed out exactly once and held
// until it is released. The destructor releases everything, also reads in flight.
//
// If a step needs more experts than slots can hold, the surplus passes through two staging slots
// that all steps share: wait_ready() reads an expert there after another one was released. So the
// resident experts follow the counting rules for every order of computing.
class [[nodiscard]] StepLease {
public:
    // Waits until at least one expert is ready, and appends all ready experts to `out`. False when
    // every expert has been handed out. Throws Error(kRead) at this and every later call if a read
    // of this step failed. Throws Error(kCapacity) if only leases of waiting threads hold the
    // staging slots, because the wait would never end.
    bool wait_ready(std::vector<ReadyExpert>& out);

    // The same without waiting: appends the experts that are ready, none if there are none.
    void take_ready(std::vector<ReadyExpert>& out);

    // The slot of that position was handed out; from now on it may be reused.
    void release(int32_t position);

    // Hands out all experts together, in the order of positions. No wait_ready() may come before
    // it. Waits for reads, and for leases of other threads if they leave too few slots. Throws
    // Error(kCapacity) if the step needs more slots than this thread's other leases leave.
    void acquire_all(std::vector<ReadyExpert>& out);

    // Ends the step early: all slots may be reused. Every other later call throws.
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

    // The name of memory that caches of several processes share, see SharedSegment. It has a slot
    // for each expert, so `slots` must be all experts. Empty: the slots are this cache's own.
    std::string shared;

    // With a device the slots lie in its memory. They are filled from pinned RAM, and it from the
    // files.
    std::shared_ptr<Device> device;
    // The pinned RAM, which other caches of the same experts may share. Null: the cache makes its
    // own from the two options below and the policy above.
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
    // Slots of the pool beside those of residents. Surplus experts pass through them, and an expert
    // is filled into one while its victim is copied out.
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

    // Starts to read absent experts, best first, as far as slots can be had. Returns the number of
    // reads that it started. Never waits.
    int32_t prefetch(LayerId layer, std::span<const ExpertIndex> experts);

    // A prediction of the experts of the next step of `layer`, best first. The prefetcher decides
    // which are read, and when: not until the previous layer has issued its demand reads. Ignored
    // if prefetch is "off".
    void predict(LayerId layer, std::span<const ExpertIndex> experts);
    // True if a call of predict() may pay now. Only "external" wants them, and only while decoding.
    [[nodiscard]] bool wants_predictions() const;

    // Experts in removed slots leave the cache. Shrinking waits for leases on those slots, and
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
