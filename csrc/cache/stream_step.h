// Steps of one stream of a device: brings the router's choice to the host, has the experts brought
// into slots, and tells the stream where they are. The only wait of the host is for the router's
// choice, and for files. Not thread-safe; one for each stream.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "cache/expert_cache.h"
#include "device/timeline.h"

namespace moeinf {

struct DeviceStep {
    LayerId layer{0};
    const std::byte* ids = nullptr;  // [tokens, top_k] on the device, in-layer; below 0: none
    bool ids_are_int64 = false;
    int64_t tokens = 0;
    int32_t top_k = 0;
    std::byte* map = nullptr;  // int32 [num_experts] on the device, written by next()
    bool prefill = false;
    bool new_sequence = false;
};

class DeviceReader {
public:
    // Experts of one next() whose bytes are still under way: computing overlaps copying.
    static constexpr size_t kMaxArriving = 16;

    // Throws Error(kInvalid) if the cache's slots lie in RAM.
    DeviceReader(std::shared_ptr<ExpertCache> cache, Stream stream);
    ~DeviceReader();

    // Enqueues the way of the ids to the host and does not wait; a step still open ends.
    void ask(const DeviceStep& step);

    // Waits for the ids asked for, then starts the step.
    void begin();

    // False once every expert has been handed out. Else the map will hold, in the stream's order,
    // the slot of each expert of this wave and -1 for the others, and the stream waits for their
    // bytes. Throws what StepLease::next throws.
    bool next();

    // Does the wave hold every expert of the step?
    [[nodiscard]] bool wave_is_whole() const noexcept { return wave_.size() == experts_.size(); }

    // What reads the wave's slots has been enqueued: they may be reused behind it.
    void done();

    void release() noexcept;
    void synchronize();

    // The ids of the step as they came.
    [[nodiscard]] const std::byte* ids() const noexcept;
    [[nodiscard]] const DeviceStep& step() const noexcept { return step_; }

private:
    static constexpr size_t kMaps = 8;

    [[nodiscard]] size_t id_count() const noexcept;
    void read_ids();
    void reserve(size_t id_bytes);

    const std::shared_ptr<ExpertCache> cache_;
    DeviceLink& link_;
    const std::shared_ptr<Device> device_;
    const TimelinePtr timeline_;
    std::unique_ptr<Arena> maps_;  // pinned, int32 [kMaps, num_experts]
    std::unique_ptr<Arena> ids_;   // pinned
    uint64_t map_points_[kMaps]{};
    size_t maps_used_ = 0;

    DeviceStep step_;
    std::optional<uint64_t> ids_point_;  // where the ids asked for will have come
    std::optional<StepLease> lease_;
    std::vector<ExpertIndex> experts_;
    std::vector<int32_t> counts_, position_of_;
    std::vector<ReadyExpert> ready_;  // handed out by the lease, not yet by us
    std::vector<ReadyExpert> wave_;
    bool more_ = false;
};

}  // namespace moeinf
