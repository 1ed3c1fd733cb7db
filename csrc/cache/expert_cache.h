// The cache: a slot pool, its residency, and the transfers that fill it. Callers ask for the
// experts of a step and get them as they become ready; a slot they hold is never evicted or
// overwritten. Thread-safe. One lock guards residency, pins and slot states; no bytes move under
// it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cache/residency.h"
#include "layout/catalog.h"
#include "memory/slot_pool.h"
#include "transfer/copy_engine.h"

namespace moeinf {

struct LayerStats {
    int64_t accesses = 0;  // distinct experts asked for, summed over steps
    int64_t hits = 0;
    int64_t misses = 0;
    int64_t evictions = 0;
    int64_t demand_bytes = 0;
    int64_t prefetch_bytes = 0;
    int64_t prefetch_useful_bytes = 0;  // prefetched and used before leaving
    int64_t prefetch_wasted_bytes = 0;  // prefetched and evicted unused
    double stall_seconds = 0;           // a step waited with nothing ready to compute
};

struct StepRequest {
    int32_t layer = 0;
    std::span<const int32_t> experts;  // in-layer ids, distinct
    std::span<const int32_t> counts;   // tokens routed to each; empty: one each
    std::span<const float> router;     // optional, see Step
    bool prefill = false;
    bool new_sequence = false;
};

struct ReadyExpert {
    int32_t position;  // index into StepRequest::experts
    int32_t slot;
};

class ExpertCache;

// One step in progress. Hands out experts as they become ready (hits first, then misses as their
// reads finish, then those that only pass through), each exactly once and each held until done().
// Destroying it releases everything, reads in flight included.
class [[nodiscard]] StepLease {
public:
    // Waits until at least one expert is ready and appends all that are to `out`. False when every
    // expert has been handed out. Throws Error(kRead) if a read failed, Error(kCapacity) if every
    // slot is held by leases of this very thread, so that waiting could never end.
    bool next(std::vector<ReadyExpert>& out);

    // The slot of that position may be reused from now on.
    void done(int32_t position);

    // Everything at once: waits for all; Error(kCapacity) if they do not fit together.
    void wait_all(std::vector<ReadyExpert>& out);

    StepLease(StepLease&&) noexcept;
    StepLease& operator=(StepLease&&) = delete;
    ~StepLease();

    struct Impl;  // in step_lease.cpp

private:
    friend class ExpertCache;
    explicit StepLease(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

struct ExpertCacheOptions {
    int32_t slots = 0;
    std::string policy = "lrfu";
    CopyEngineOptions copy;
};

class ExpertCache {
public:
    ExpertCache(std::shared_ptr<const Catalog> catalog, ExpertCacheOptions options);
    ~ExpertCache();

    // Starts a step: pins its hits, places its misses and starts their reads.
    StepLease begin(const StepRequest& request);

    // Starts reading what is absent, best first, where a slot may be had for it. Returns how many
    // reads it started. Never waits.
    int32_t prefetch(int32_t layer, std::span<const int32_t> experts);

    // Shrinking waits for leases on the slots that go; growing may throw Error(kCapacity).
    void resize(int32_t slots);

    void reset_stats();
    [[nodiscard]] std::vector<LayerStats> stats() const;               // one per layer
    [[nodiscard]] std::vector<int32_t> resident(int32_t layer) const;  // in-layer ids

    [[nodiscard]] const SlotPool& pool() const noexcept;
    [[nodiscard]] const Catalog& catalog() const noexcept;

    struct Impl;

private:
    friend class StepLease;
    std::shared_ptr<Impl> impl_;
};

}  // namespace moeinf
