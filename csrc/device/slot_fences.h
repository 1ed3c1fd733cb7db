// For each slot of a pool in device memory: the stream position at which its fill completes, and
// the positions of its readers. The streams wait for these positions; the host waits for none.
//
//     [fill] ---> [reader of stream A] ---+
//        |                                +---> [next fill] ---> ...
//        +------> [reader of stream B] ---+
//
// An arrow means "must pass first". A reader waits for the fill. The next fill waits for the
// previous fill and for all readers since. Thread-safe.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "base/ids.h"
#include "device/timeline.h"

namespace moeinf {

class SlotFences {
public:
    explicit SlotFences(int32_t slots) : slots_(slots) {}

    // Call before_fill() before a fill of the slot is enqueued on `stream`, and filled() after it.
    void before_fill(SlotId slot, Stream stream);
    void filled(SlotId slot, const TimelinePtr& timeline, uint64_t point);

    // Call before_read() before a reader of the slot is enqueued on `stream`, and read() after it.
    void before_read(SlotId slot, Stream stream);
    void read(SlotId slot, const TimelinePtr& timeline, uint64_t point);

    // True if the device has passed the end of the slot's fill.
    [[nodiscard]] bool arrived(SlotId slot);

    // True if no fill and no reader of slots from `first` on is still in progress.
    [[nodiscard]] bool idle(SlotId first);

private:
    struct Point {
        TimelinePtr timeline;
        uint64_t mark = 0;
    };
    struct Fences {
        Point fill;
        std::vector<Point> readers;  // since the fill, one per stream
    };

    std::mutex mutex_;  // guards slots_; taken before a timeline's own
    PerSlot<Fences> slots_;
};

}  // namespace moeinf
