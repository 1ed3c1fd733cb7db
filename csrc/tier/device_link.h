// Fills the slots of a tier in device memory from a RAM tier, by copies on streams of its own.
//
// Demands are enqueued at once, all of a flush together. Prefetches go in chunks, of which never
// more than kWindowBytes are under way, so that a demand waits for one chunk at most. A demand's
// fill ends as soon as its copy is enqueued: readers wait for the slot's fences, not the host.
//
// A copy job:
//
//   command -> pinned in RAM? --yes--> kDemand:   enqueued as one; its fill ends; unpinned behind
//   it
//                    |                 kPrefetch: queued -> chunks under way -> arrived; fill ends
//                    no: waits there for on_pinned            (promoted: the rest as a demand)
#pragma once

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
#include "tier/host_tier.h"
#include "tier/source.h"

namespace moeinf {

struct LinkStats {
    int64_t copied_bytes = 0;   // to the device
    int64_t demoted_bytes = 0;  // from it
    int64_t copies = 0;
    int64_t gathers = 0;  // launches, each for several experts
};

class DeviceLink final : public Source {
public:
    static constexpr size_t kWindowBytes = size_t{4} << 20;
    static constexpr size_t kChunkBytes = kWindowBytes / 2;
    static constexpr size_t kMaxChunks = 16;  // under way: small ones cost a demand latency

    // Told, with no lock of a tier held, when a fill's bytes have arrived, which for a demand is
    // after it has ended.
    using Arrived = std::function<void(ExpertId expert, Priority submitted)>;

    // Experts of at most `gather_below` bytes are gathered where a flush has several.
    DeviceLink(Tier& tier, std::shared_ptr<Device> device, std::shared_ptr<HostTier> host,
               size_t gather_below, Arrived arrived);
    // What is queued fails; waits for copies under way, but not for ever.
    ~DeviceLink() override;

    [[nodiscard]] bool accepts_demotion(ExpertId expert) const override {
        return host_->accepts_demotion(expert);
    }
    [[nodiscard]] bool is_idle(SlotId first) override {
        return !has_commands() && fences_.idle(first);
    }

    [[nodiscard]] SlotFences& fences() noexcept { return fences_; }
    [[nodiscard]] HostTier& host() const noexcept { return *host_; }
    [[nodiscard]] const std::shared_ptr<Device>& device() const noexcept { return device_; }
    [[nodiscard]] LinkStats stats() const;
    void reset_stats();

private:
    struct CopyJob;
    using CopyJobPtr = std::shared_ptr<CopyJob>;
    struct InFlight {  // a copy; its expert is pinned in RAM until the timeline has passed the
                       // point
        ExpertId expert;
        TimelinePtr timeline;
        uint64_t point;
        bool is_demotion;
        std::optional<Priority> arrives;  // none: nobody is told
    };
    struct Chunk {
        uint64_t point;  // of prefetch_, behind it
        size_t nbytes;
    };

    void execute(std::span<const Command> commands) noexcept override;
    void after_execute() noexcept override { host_->flush(); }
    void start(const FillPtr& fill);
    void promote_job(const CopyJobPtr& job);
    void demote(ExpertId expert, SlotId slot);
    void on_pinned(const CopyJobPtr& job, const PinnedExpert& pinned, const std::string& error);
    void queue_prefetch(const CopyJobPtr& job);

    void copy_demands(std::span<const CopyJobPtr> demands) noexcept;
    void enqueue(const CopyJobPtr& job, size_t nbytes, Stream stream);
    void finish(const CopyJobPtr& job, std::string error);
    void abandon(const CopyJobPtr& job, const TimelinePtr& timeline, const char* why) noexcept;
    void unpin_behind(const CopyJobPtr& job, const TimelinePtr& timeline, uint64_t point,
                      std::optional<Priority> arrives);
    void add_in_flight(InFlight copy);
    void wake_worker();
    void set_holder(ExpertId expert, bool holds);

    void work(const std::stop_token& stop);
    [[nodiscard]] bool unpin_passed();
    [[nodiscard]] bool pump_prefetches();
    void start_chunk(const CopyJobPtr& job);
    void end_prefetches();
    [[nodiscard]] bool prefetches_passed(uint64_t point) noexcept;

    [[nodiscard]] bool drain();
    void give_back_pins(std::span<const CopyJobPtr> jobs);

    Tier& tier_;
    const std::shared_ptr<Device> device_;
    const std::shared_ptr<HostTier> host_;
    const size_t copy_bytes_;  // of one expert, gaps between segments included
    const size_t gather_below_;
    const Arrived arrived_;
    const TimelinePtr demand_, prefetch_, out_;
    SlotFences fences_;

    mutable std::mutex queues_;  // guards up to the next blank line
    std::vector<InFlight> in_flight_;
    LinkStats stats_;
    bool awake_ = false;
    std::condition_variable_any wake_;

    // Guarded by `issuing`.
    std::vector<CopyJobPtr> demands_;    // of the commands being carried out
    std::deque<CopyJobPtr> prefetches_;  // pinned in RAM; the first may be under way
    std::deque<CopyJobPtr> arriving_;    // prefetches of which every chunk is under way
    std::deque<Chunk> window_;           // chunks under way
    size_t window_bytes_ = 0;            // of these
    PerExpert<uint8_t> holds_;           // does RAM know that the device holds it?
    size_t waiting_in_host_ = 0;         // jobs that on_pinned will be called for
    std::condition_variable_any told_;   // one of them has been
    bool ending_ = false;

    std::jthread worker_;  // last: it uses what is above
};

}  // namespace moeinf
