// A stream and points on it that other streams wait for. signal() allocates nothing, because only
// 64 events exist and are used in a ring:
//
//     point   1    2    3   ...   64   65   66
//     event  [1]  [2]  [3]  ...  [0]  [1]  [2]     point 1 now shares the event of point 65
//
// An old point may be represented by the event of a newer one. Waiting for it is then correct but
// may take longer. A deadlock is impossible, because all work before a mark was enqueued before the
// mark. Thread-safe.
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
    // How long a destructor waits for a device. After that the memory stays with the process.
    static constexpr std::chrono::seconds kShutdownTimeout{10};

    // The timeline destroys its stream if `own` is true.
    Timeline(std::shared_ptr<Device> device, Stream stream, bool own);
    ~Timeline();
    Timeline(const Timeline&) = delete;
    Timeline& operator=(const Timeline&) = delete;

    [[nodiscard]] Stream stream() const noexcept { return stream_; }

    // Marks the point behind all work that was enqueued so far. Points grow, from 1 on.
    uint64_t signal();

    // True if the stream has passed the point. Always true for 0.
    [[nodiscard]] bool is_complete(uint64_t point);

    // Makes the stream `other` wait for the point. Enqueues nothing if it was reached already.
    void wait_on(Stream other, uint64_t point);

    void synchronize(uint64_t point);  // the host waits
    // The host waits for `patience` at most. False if the point was not reached.
    [[nodiscard]] bool is_complete_within(uint64_t point, std::chrono::milliseconds patience);

private:
    static constexpr uint64_t kEvents = 64;
    [[nodiscard]] bool is_complete_locked(uint64_t point);
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
