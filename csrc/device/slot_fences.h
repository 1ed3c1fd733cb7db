// For each slot of a pool in device memory: up to where on which stream it is being filled, and who
// still reads it. A reader's stream waits for the fill; a fill waits for the readers and for the
// fill before. The host waits for neither. Thread-safe.
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

    // Before enqueuing a fill of the slot on `stream`, and behind it.
    void before_fill(SlotId slot, Stream stream);
    void filled(SlotId slot, const TimelinePtr& timeline, uint64_t point);

    // Before enqueuing what reads the slot on `stream`, and behind it.
    void before_read(SlotId slot, Stream stream);
    void read(SlotId slot, const TimelinePtr& timeline, uint64_t point);

    // Have the slot's bytes arrived, as far as the device says now?
    [[nodiscard]] bool arrived(SlotId slot);

    // Is nothing under way on slots from `first` on?
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
