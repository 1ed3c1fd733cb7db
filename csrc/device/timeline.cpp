#include "device/timeline.h"

#include <algorithm>
#include <thread>
#include <utility>

namespace moeinf {

Timeline::Timeline(std::shared_ptr<Device> device, Stream stream, bool own)
    : device_(std::move(device)), stream_(stream), own_(own) {}

Timeline::~Timeline() {
    for (const Event event : events_) {
        if (event != nullptr) device_->destroy_event(event);
    }
    if (own_) device_->destroy_stream(stream_);
}

uint64_t Timeline::signal() {
    const std::lock_guard lock(mutex_);
    Event& event = events_[(marked_ + 1) % kEvents];
    if (event == nullptr) event = device_->create_event();
    device_->record(event, stream_);
    return ++marked_;
}

bool Timeline::is_complete_locked(uint64_t point) {
    if (point <= reached_) return true;
    // The event may stand for a newer point by now. If that is reached, this one is too.
    if (!device_->finished(event_of(point))) return false;
    reached_ = std::max(reached_, point);
    return true;
}

bool Timeline::is_complete(uint64_t point) {
    const std::lock_guard lock(mutex_);
    return is_complete_locked(point);
}

void Timeline::wait_on(Stream other, uint64_t point) {
    if (other == stream_) return;  // a stream keeps its own order
    const std::lock_guard lock(mutex_);
    if (!is_complete_locked(point)) device_->wait(other, event_of(point));
}

bool Timeline::is_complete_within(uint64_t point, std::chrono::milliseconds patience) {
    const auto give_up = std::chrono::steady_clock::now() + patience;
    while (!is_complete(point)) {
        if (std::chrono::steady_clock::now() > give_up) return false;
        std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    return true;
}

void Timeline::synchronize(uint64_t point) {
    Event event = nullptr;
    {
        const std::lock_guard lock(mutex_);
        if (is_complete_locked(point)) return;
        event = event_of(point);
    }
    device_->synchronize(event);
    const std::lock_guard lock(mutex_);
    reached_ = std::max(reached_, point);
}

}  // namespace moeinf
