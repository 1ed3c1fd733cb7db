// A stream and the points on it that others wait for. Marking a point allocates nothing: events are
// reused in a ring, and a point that the ring has passed stands for the mark that took its event.
// Waiting for it then waits longer, never shorter. What a mark follows was enqueued before it, so
// such waits cannot form a circle. Thread-safe.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>

#include "device/device.h"

namespace moeinf {

class Timeline {
public:
    // What a destructor waits for a device before it leaves memory in use to the process.
    static constexpr std::chrono::seconds kShutdownTimeout{10};

    // `own` streams are destroyed with the timeline.
    Timeline(std::shared_ptr<Device> device, Stream stream, bool own);
    ~Timeline();
    Timeline(const Timeline&) = delete;
    Timeline& operator=(const Timeline&) = delete;

    [[nodiscard]] Stream stream() const noexcept { return stream_; }

    // The point behind everything enqueued so far; above 0, and growing.
    uint64_t mark();

    // Has the stream passed the point? 0 lies behind everybody.
    [[nodiscard]] bool reached(uint64_t point);

    // `other` waits for the point, the host does not. Nothing is enqueued if it has been reached.
    void hold_back(Stream other, uint64_t point);

    void synchronize(uint64_t point);  // the host waits
    // The host waits, but not for ever. False: not reached by then.
    [[nodiscard]] bool reached_within(uint64_t point, std::chrono::milliseconds patience);

private:
    static constexpr uint64_t kEvents = 64;
    [[nodiscard]] bool reached_locked(uint64_t point);
    [[nodiscard]] Event event_of(uint64_t point) const { return events_[point % kEvents]; }

    const std::shared_ptr<Device> device_;
    const Stream stream_;
    const bool own_;
    std::mutex mutex_;  // guards what follows
    std::array<Event, kEvents> events_{};
    uint64_t marked_ = 0;
    uint64_t reached_ = 0;
};

using TimelinePtr = std::shared_ptr<Timeline>;

}  // namespace moeinf
