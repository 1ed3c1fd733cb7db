#include "device/slot_fences.h"

#include <algorithm>

namespace moeinf {

void SlotFences::before_fill(int32_t row, Stream stream) {
    const std::lock_guard lock(mutex_);
    Row& fences = row_at(row);
    if (fences.fill.timeline) fences.fill.timeline->hold_back(stream, fences.fill.mark);
    for (const Point& reader : fences.readers) reader.timeline->hold_back(stream, reader.mark);
}

void SlotFences::filled(int32_t row, const TimelinePtr& timeline, uint64_t point) {
    const std::lock_guard lock(mutex_);
    row_at(row).fill = {timeline, point};
    row_at(row).readers.clear();  // the fill comes after them
}

void SlotFences::before_read(int32_t row, Stream stream) {
    const std::lock_guard lock(mutex_);
    const Point& fill = row_at(row).fill;
    if (fill.timeline) fill.timeline->hold_back(stream, fill.mark);
}

void SlotFences::read(int32_t row, const TimelinePtr& timeline, uint64_t point) {
    const std::lock_guard lock(mutex_);
    std::vector<Point>& readers = row_at(row).readers;
    const auto same = std::find_if(readers.begin(), readers.end(),
                                   [&](const Point& one) { return one.timeline == timeline; });
    if (same != readers.end()) {
        same->mark = point;
    } else {
        readers.push_back({timeline, point});
    }
}

bool SlotFences::arrived(int32_t row) {
    const std::lock_guard lock(mutex_);
    const Point& fill = row_at(row).fill;
    return fill.timeline == nullptr || fill.timeline->reached(fill.mark);
}

bool SlotFences::idle(int32_t first_row) {
    const std::lock_guard lock(mutex_);
    return std::all_of(rows_.begin() + first_row, rows_.end(), [](const Row& row) {
        const auto passed = [](const Point& point) { return point.timeline->reached(point.mark); };
        return (row.fill.timeline == nullptr || passed(row.fill)) &&
               std::all_of(row.readers.begin(), row.readers.end(), passed);
    });
}

}  // namespace moeinf
