#include "device/slot_fences.h"

#include <algorithm>

namespace moeinf {

void SlotFences::before_fill(SlotId slot, Stream stream) {
    const std::lock_guard lock(mutex_);
    Fences& fences = slots_[slot];
    if (fences.fill.timeline) fences.fill.timeline->wait_on(stream, fences.fill.mark);
    for (const Point& reader : fences.readers) reader.timeline->wait_on(stream, reader.mark);
}

void SlotFences::filled(SlotId slot, const TimelinePtr& timeline, uint64_t point) {
    const std::lock_guard lock(mutex_);
    slots_[slot].fill = {timeline, point};
    slots_[slot].readers.clear();  // the fill has waited for them
}

void SlotFences::before_read(SlotId slot, Stream stream) {
    const std::lock_guard lock(mutex_);
    const Point& fill = slots_[slot].fill;
    if (fill.timeline) fill.timeline->wait_on(stream, fill.mark);
}

void SlotFences::read(SlotId slot, const TimelinePtr& timeline, uint64_t point) {
    const std::lock_guard lock(mutex_);
    std::vector<Point>& readers = slots_[slot].readers;
    const auto same = std::find_if(readers.begin(), readers.end(),
                                   [&](const Point& one) { return one.timeline == timeline; });
    if (same != readers.end()) {
        same->mark = point;
    } else {
        readers.push_back({timeline, point});
    }
}

bool SlotFences::arrived(SlotId slot) {
    const std::lock_guard lock(mutex_);
    const Point& fill = slots_[slot].fill;
    return fill.timeline == nullptr || fill.timeline->is_complete(fill.mark);
}

bool SlotFences::idle(SlotId first) {
    const std::lock_guard lock(mutex_);
    return std::all_of(slots_.begin() + number(first), slots_.end(), [](const Fences& slot) {
        const auto passed = [](const Point& point) {
            return point.timeline->is_complete(point.mark);
        };
        return (slot.fill.timeline == nullptr || passed(slot.fill)) &&
               std::all_of(slot.readers.begin(), slot.readers.end(), passed);
    });
}

}  // namespace moeinf
