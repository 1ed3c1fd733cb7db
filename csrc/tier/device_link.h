// Fills the slots of a tier in device memory from a RAM tier, by copies on its own streams.
//
// All demands of a flush are enqueued together and at once. Prefetches are cut into chunks. At most
// kWindowBytes of chunks are in flight, so a demand waits for one chunk at most. The fill of a
// demand ends when its copy is enqueued: the readers' streams wait for the slot's fences, the host
// does not.
//
// A copy job:
//
//   command --> is the expert pinned in RAM?
//                 | no: waits in RAM for on_pinned()
//                 v yes
//   kDemand:   one copy is enqueued --> the fill ends --> RAM unpins when the copy has passed
//   kPrefetch: queued --> chunks in flight --> arrived --> the fill ends
//                 promoted: the rest is copied as a demand
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
    static constexpr size_t kMaxChunks = 16;  // in flight: many small chunks would delay a demand

    // Called when the bytes of a fill have arrived, while no lock of a tier is held. For a demand
    // this is after the fill has ended.
    using Arrived = std::function<void(ExpertId expert, Priority submitted)>;

    // A flush with several experts of at most `gather_below` bytes gathers them with one kernel.
    DeviceLink(Tier& tier, std::shared_ptr<Device> device, std::shared_ptr<HostTier> host,
               size_t gather_below, Arrived arrived);
    // Queued jobs fail. Waits for copies in flight, but only for a limited time.
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
    // A copy in flight. Its expert is pinned in RAM until the timeline has passed the point.
    struct InFlight {
        ExpertId expert;
        TimelinePtr timeline;
        uint64_t point;
        bool is_demotion;
        std::optional<Priority> arrives;  // none: no call of `arrived`
    };
    struct Chunk {
        uint64_t point;  // of prefetch_, after the chunk
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
    const size_t copy_bytes_;  // of one expert, with the gaps between its segments
    const size_t gather_below_;
    const Arrived arrived_;
    const TimelinePtr demand_, prefetch_, out_;
    SlotFences fences_;

    mutable std::mutex queues_;  // guards the members up to the next blank line
    std::vector<InFlight> in_flight_;
    LinkStats stats_;
    bool awake_ = false;
    std::condition_variable_any wake_;

    // Guarded by `issuing`.
    std::vector<CopyJobPtr> demands_;    // of the commands in execution
    std::deque<CopyJobPtr> prefetches_;  // pinned in RAM; the first may be in flight
    std::deque<CopyJobPtr> arriving_;    // prefetches whose chunks are all in flight
    std::deque<Chunk> window_;           // chunks in flight
    size_t window_bytes_ = 0;            // of the window
    PerExpert<uint8_t> holds_;           // 1: RAM knows that the device holds it
    size_t waiting_in_host_ = 0;         // jobs that on_pinned will be called for
    std::condition_variable_any told_;   // on_pinned has been called
    bool ending_ = false;

    std::jthread worker_;  // last: it uses the members above
};

}  // namespace moeinf
