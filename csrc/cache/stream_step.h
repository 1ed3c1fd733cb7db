// Steps of one stream of a device: copies the router's ids to the host, starts the fills, and gives
// the stream a map of the slots. The host waits only for the router's ids and for files. All other
// order is kept by the stream.
//
//     copy_ids()         begin()             next()
//   idle -----> ids under way -----> a wave -----> the next wave, or idle
//                                      |
//                                      +-- release() --> idle
//
// copy_ids() and begin() are two calls, so the host can prepare its kernels while the ids travel.
// Not thread-safe; one for each stream.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/routing.h"
#include "cache/expert_cache.h"
#include "device/timeline.h"

namespace moeinf {

struct RoutedStep {
    LayerId layer{0};
    const std::byte* ids = nullptr;  // [tokens, top_k] on the device, in-layer; see Routing
    bool ids_are_int64 = false;
    int64_t tokens = 0;
    int32_t top_k = 0;
    // int32 [num_experts + 1] on the device, written by begin() and next(). The last entry, for the
    // id that means "no expert", is always -1.
    std::byte* map = nullptr;
    bool prefill = false;
    bool new_sequence = false;
    int64_t caller = 0;  // see Step
};

// The experts of a step that can be computed now.
struct Wave {
    bool whole;               // all of the step's
    bool names_past_the_end;  // see Routing
    int32_t slots;            // of the cache: residents it can hold
};

class StepStream {
public:
    // The most experts of one wave whose copies are still in flight: computing overlaps copying.
    static constexpr size_t kMaxArriving = 16;

    // Throws Error(kInvalid) if the cache's slots lie in RAM.
    StepStream(std::shared_ptr<ExpertCache> cache, Stream stream);
    ~StepStream();

    // Enqueues a copy of the ids to the host and does not wait. Ends a step that is still open.
    void copy_ids(const RoutedStep& step);

    // Waits for the ids, starts the step and returns its first wave, or nothing if no id names an
    // expert. The map will hold the slot of each expert of the wave and -1 for the others, and the
    // stream will wait for their bytes. Throws the errors of StepLease::wait_ready; the step has
    // ended then.
    std::optional<Wave> begin();

    // The next wave, or nothing after the last one, which ends the step. The slots of the previous
    // wave may be reused after the work that the stream has been given so far. Throws as begin().
    std::optional<Wave> next();

    // Ends the step early.
    void release() noexcept;
    void synchronize();

    // The ids of the step as they came.
    [[nodiscard]] const std::byte* ids() const noexcept;
    [[nodiscard]] const RoutedStep& step() const noexcept { return step_; }

private:
    static constexpr size_t kMaps = 8;

    [[nodiscard]] size_t map_entries() const noexcept;
    void reserve(size_t id_bytes);
    void read_ids();
    template <class Use>
    auto with_ids(const Use& use);
    std::optional<Wave> take_wave();
    void end_wave();

    const std::shared_ptr<ExpertCache> cache_;
    DeviceLink& link_;
    const std::shared_ptr<Device> device_;
    const TimelinePtr timeline_;
    std::unique_ptr<Arena> maps_;  // pinned, int32 [kMaps, map entries]
    std::unique_ptr<Arena> ids_;   // pinned
    uint64_t map_points_[kMaps]{};
    size_t maps_used_ = 0;

    RoutedStep step_;
    std::optional<uint64_t> ids_point_;  // where the ids will have come
    std::optional<StepLease> lease_;
    Routing routing_;
    std::vector<ReadyExpert> ready_;  // handed out by the lease, not yet by us
    std::vector<ReadyExpert> wave_;
    bool more_ = false;
};

}  // namespace moeinf
