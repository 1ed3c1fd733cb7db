// Slots in device memory, filled from the host tier by copies on streams of their own.
//
// Demands are enqueued at once, all of a flush together. Prefetches go in chunks, of which never
// more than kWindowBytes are under way, so that a demand waits for one chunk at most. A slot is
// handed out as soon as its demand is enqueued: readers wait for the slot's fences, not the host.
//
// Locks: `issuing_` for whoever enqueues (before the host tier's and the cache's), `queues_` for
// what is noted under the cache's lock (after it).
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stop_token>
#include <thread>
#include <vector>

#include "device/slot_fences.h"
#include "device/timeline.h"
#include "memory/slot_pool.h"
#include "tier/host_tier.h"
#include "tier/transport.h"

namespace moeinf {

struct LinkStats {
    int64_t copied_bytes = 0;   // to the device
    int64_t demoted_bytes = 0;  // from it
    int64_t copies = 0;
    int64_t gathers = 0;  // launches, each for several experts
};

class DeviceTransport final : public Transport {
public:
    static constexpr size_t kWindowBytes = size_t{4} << 20;
    static constexpr size_t kChunkBytes = kWindowBytes / 2;
    static constexpr size_t kMaxChunks = 16;  // under way: small ones cost a demand latency

    // Told, with no lock of the cache held, when a transfer's bytes have arrived, which for a
    // demand is after it has ended.
    using Arrived = std::function<void(ExpertId expert, Priority submitted)>;

    // Experts of at most `gather_below` bytes are gathered where a flush has several.
    DeviceTransport(std::shared_ptr<const Catalog> catalog, std::shared_ptr<Device> device,
                    std::shared_ptr<SlotPool> pool, HostTierOptions host, size_t gather_below,
                    Arrived arrived);
    // What is queued ends as kCancelled; waits for copies under way, but not for ever.
    ~DeviceTransport() override;

    TransferPtr submit(ExpertId expert, SlotId slot, Priority priority,
                       TransferCallback done) override;
    void promote(const TransferPtr& transfer) override;
    void left(ExpertId expert, SlotId slot) override;
    bool copies_out(ExpertId expert) override { return host_->wants(expert); }
    bool has_queued() const noexcept override { return queued_.load(std::memory_order_acquire); }
    void flush() noexcept override;
    bool idle(SlotId first) override { return !has_queued() && fences_.idle(first); }
    const FileReader& files() const noexcept override { return host_->files(); }
    int64_t delay_bytes() const noexcept override { return static_cast<int64_t>(kWindowBytes); }

    [[nodiscard]] SlotFences& fences() noexcept { return fences_; }
    [[nodiscard]] HostTier& host() noexcept { return *host_; }
    [[nodiscard]] const std::shared_ptr<Device>& device() const noexcept { return device_; }
    [[nodiscard]] LinkStats link_stats() const;
    void reset_stats();

private:
    struct Job;
    using JobPtr = std::shared_ptr<Job>;
    struct Request {  // noted under the cache's lock, carried out by flush()
        enum class Kind : uint8_t { kFill, kPromote, kLeft } kind;
        JobPtr job;
        ExpertId expert;
        SlotId slot;
    };
    struct Held {  // an expert of the host tier, until its copy has passed the point
        ExpertId expert;
        TimelinePtr timeline;
        uint64_t point;
        std::optional<Priority> arrives;  // none: nobody is told
    };
    struct Chunk {
        uint64_t point;  // of prefetch_, behind it
        size_t nbytes;
    };

    void carry_out(const Request& request, std::vector<JobPtr>& demands);
    void start(const JobPtr& job, std::vector<JobPtr>& demands);
    void on_host_ready(const JobPtr& job, std::byte* bytes, const std::string& error);
    void copy_demands(std::span<const JobPtr> demands) noexcept;
    void demote(ExpertId expert, SlotId slot);
    void finish(const JobPtr& job, TransferState state, std::string error = {});
    void abandon(const JobPtr& job, const TimelinePtr& timeline, const char* why) noexcept;
    void hold_until(ExpertId expert, const TimelinePtr& timeline, uint64_t point,
                    std::optional<Priority> arrives = {});
    void enqueue(const JobPtr& job, size_t nbytes, Stream stream);

    [[nodiscard]] bool device_rests();

    void work(const std::stop_token& stop);
    bool release_passed();
    bool pump_prefetches();
    void start_chunk(const JobPtr& job);
    void end_prefetches();
    [[nodiscard]] bool reached_by_prefetches(uint64_t point) noexcept;

    const std::shared_ptr<const Catalog> catalog_;
    const std::shared_ptr<Device> device_;
    const std::shared_ptr<SlotPool> pool_;
    const size_t copy_bytes_;  // of one expert, gaps between segments included
    const size_t gather_below_;
    const Arrived arrived_;
    const TimelinePtr demand_, prefetch_, out_;
    SlotFences fences_;

    mutable std::mutex queues_;  // guards the next three
    std::vector<Request> requests_;
    std::vector<Held> held_;
    LinkStats stats_;
    std::atomic<bool> queued_{false};  // something was noted that has not been carried out

    // Guards the next eight, and every enqueuing. Recursive: releasing an expert may bring the next
    // one its room, and that one is enqueued on the spot.
    std::recursive_mutex issuing_;
    std::vector<Request> flushed_;   // by the flush() in progress
    std::vector<JobPtr> demands_;    // of that one
    std::deque<JobPtr> prefetches_;  // their bytes are in the host tier; the first may be under way
    std::deque<JobPtr> arriving_;    // prefetches of which every chunk is under way
    std::deque<Chunk> window_;       // chunks under way
    size_t window_bytes_ = 0;        // of these
    PerExpert<uint64_t> demoted_at_;  // the point of `out_` behind its demotion
    bool ending_ = false;

    std::condition_variable_any wake_;  // with queues_
    bool awake_ = false;
    std::unique_ptr<HostTier> host_;
    std::jthread worker_;  // last: it uses what is above
};

}  // namespace moeinf
