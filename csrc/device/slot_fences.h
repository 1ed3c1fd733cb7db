// For each row of a pool in device memory: up to where on which stream it is being filled, and who
// still reads it. A reader's stream waits for the fill; a fill waits for the readers and for the
// fill before. The host waits for neither. Thread-safe.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "device/timeline.h"

namespace moeinf {

class SlotFences {
public:
    explicit SlotFences(int32_t rows) : rows_(static_cast<size_t>(rows)) {}

    // Before enqueuing a fill of the row on `stream`, and behind it.
    void before_fill(int32_t row, Stream stream);
    void filled(int32_t row, const TimelinePtr& timeline, uint64_t point);

    // Before enqueuing what reads the row on `stream`, and behind it.
    void before_read(int32_t row, Stream stream);
    void read(int32_t row, const TimelinePtr& timeline, uint64_t point);

    // Have the row's bytes arrived, as far as the device says now?
    [[nodiscard]] bool arrived(int32_t row);

    // Is nothing under way on rows from `first_row` on?
    [[nodiscard]] bool idle(int32_t first_row);

private:
    struct Point {
        TimelinePtr timeline;
        uint64_t mark = 0;
    };
    struct Row {
        Point fill;
        std::vector<Point> readers;  // since the fill, one per stream
    };
    Row& row_at(int32_t row) { return rows_[static_cast<size_t>(row)]; }

    std::mutex mutex_;  // guards rows_; taken before a timeline's own
    std::vector<Row> rows_;
};

}  // namespace moeinf
