// The worker thread of a device's link: it unpins experts in RAM when their copies have passed, and
// keeps the window of prefetches full. Also the destruction of a link.
#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <utility>

#include "base/ranges.h"
#include "tier/copy_job.h"
#include "tier/device_link.h"
#include "tier/tier.h"

namespace moeinf {
namespace {

using namespace std::chrono_literals;

constexpr auto kPollCopies = 20us;

}  // namespace

void DeviceLink::work(const std::stop_token& stop) {
#ifdef __linux__
    (void)prctl(PR_SET_TIMERSLACK, 1000UL);  // without this, a sleep of 20 us takes 70
#endif
    device_->set_relaxed_capture_mode();
    while (!stop.stop_requested()) {
        const bool pumping = pump_prefetches();
        const bool holding = unpin_passed();
        host_->flush();
        std::unique_lock lock(queues_);
        if (pumping || holding) {
            lock.unlock();
            std::this_thread::sleep_for(kPollCopies);
        } else {
            wake_.wait(lock, stop, [this] { return awake_; });
            awake_ = false;
        }
    }
}

// True if copies are still in flight.
bool DeviceLink::unpin_passed() {
    std::vector<InFlight> passed;
    bool holding = false;
    {
        const std::lock_guard lock(queues_);
        const Timeline* late =
            nullptr;  // has not passed this point, so it has not passed later ones
        uint64_t late_point = 0;
        std::erase_if(in_flight_, [&](const InFlight& copy) {
            if (copy.timeline.get() == late && copy.point >= late_point) return false;
            try {
                if (!copy.timeline->is_complete(copy.point)) {
                    late = copy.timeline.get();
                    late_point = copy.point;
                    return false;
                }
            } catch (const std::exception&) {
                return false;  // the device reports errors and moves nothing; the destructor
                               // decides
            }
            passed.push_back(copy);
            return true;
        });
        holding = !in_flight_.empty();
    }
    for (const InFlight& copy : passed) {
        if (arrived_ && copy.arrives) arrived_(copy.expert, *copy.arrives);
        copy.is_demotion ? host_->end_demotion(copy.expert, true) : host_->unpin(copy.expert);
    }
    return holding;
}

// True if prefetches are queued or in flight.
bool DeviceLink::pump_prefetches() {
    const std::lock_guard lock(issuing);
    end_prefetches();
    while (!prefetches_.empty() && window_bytes_ < kWindowBytes && window_.size() < kMaxChunks) {
        const CopyJobPtr job = prefetches_.front();
        try {
            start_chunk(job);
        } catch (const std::exception& error) {
            prefetches_.pop_front();
            abandon(job, prefetch_, error.what());
            continue;
        }
        if (job->copied < copy_bytes_) continue;
        prefetches_.pop_front();
        arriving_.push_back(job);
    }
    return !prefetches_.empty() || !window_.empty();
}

void DeviceLink::start_chunk(const CopyJobPtr& job) {
    const Range range("moeinf copy");
    const Stream stream = prefetch_->stream();
    if (job->copied == 0) {
        job->wait_for_source(stream);
        fences_.before_fill(job->slot, stream);
    }
    const size_t nbytes = std::min(kChunkBytes, copy_bytes_ - job->copied);
    enqueue(job, nbytes, stream);
    job->last_chunk = prefetch_->signal();
    window_.push_back({job->last_chunk, nbytes});
    window_bytes_ += nbytes;
    if (job->copied == copy_bytes_) fences_.filled(job->slot, prefetch_, job->last_chunk);
}

// Ends the prefetches whose last chunk has arrived.
void DeviceLink::end_prefetches() {
    while (!window_.empty() && prefetches_passed(window_.front().point)) {
        window_bytes_ -= window_.front().nbytes;
        window_.pop_front();
    }
    while (!arriving_.empty() && prefetches_passed(arriving_.front()->last_chunk)) {
        const CopyJobPtr job = arriving_.front();
        arriving_.pop_front();
        if (arrived_) arrived_(job->expert, job->fill->priority);
        host_->unpin(job->expert);
        finish(job, {});
    }
}

bool DeviceLink::prefetches_passed(uint64_t point) noexcept {
    try {
        return prefetch_->is_complete(point);
    } catch (const std::exception&) {
        return false;
    }
}

DeviceLink::~DeviceLink() {
    worker_.request_stop();
    worker_.join();
    std::vector<CopyJobPtr> pinned;
    std::vector<CopyJobPtr> ended;
    {
        std::unique_lock lock(issuing);
        ending_ = true;
        pinned.assign(prefetches_.begin(), prefetches_.end());
        pinned.insert(pinned.end(), arriving_.begin(), arriving_.end());
        prefetches_.clear();
        arriving_.clear();
        ended = pinned;
        for (const FillWaiterPtr& waiter : host_->withdraw(this)) {
            --waiting_in_host_;
            ended.push_back(std::static_pointer_cast<CopyJob>(waiter));
        }
        told_.wait(lock, [this] {
            return waiting_in_host_ == 0;
        });  // calls of on_pinned() that have begun
        for (const CopyJobPtr& job : ended) finish(job, kEnding);
        for (Command& command : take_commands()) {
            if (command.kind == Command::Kind::kFill) tier_.end_fill(*command.fill, kEnding);
        }
        for (const ExpertId expert : tier_.catalog()->shape().experts()) set_holder(expert, false);
    }
    // Memory under a copy must stay. If the device never ends the copy, the memory stays with the
    // process.
    if (drain()) {
        give_back_pins(pinned);
    } else {
        (void)new std::shared_ptr<HostTier>(host_);
        (void)new std::shared_ptr<SlotPool>(tier_.shared_pool());
    }
    host_->flush();
}

// Waits for a limited time until the device has done all of its work.
bool DeviceLink::drain() {
    try {
        for (const TimelinePtr& timeline : {demand_, prefetch_, out_}) {
            if (!timeline->is_complete_within(timeline->signal(), Timeline::kShutdownTimeout)) {
                return false;
            }
        }
        const auto give_up = std::chrono::steady_clock::now() + Timeline::kShutdownTimeout;
        while (!fences_.idle(SlotId{0})) {  // the readers' streams
            if (std::chrono::steady_clock::now() > give_up) return false;
            std::this_thread::sleep_for(100us);
        }
    } catch (const std::exception&) {
        // A device that only reports errors copies nothing any more.
    }
    return true;
}

void DeviceLink::give_back_pins(std::span<const CopyJobPtr> jobs) {
    const auto passed = [](const InFlight& copy) {
        try {
            return copy.timeline->is_complete(copy.point);
        } catch (const std::exception&) {
            return false;
        }
    };
    for (const InFlight& copy : in_flight_) {
        copy.is_demotion ? host_->end_demotion(copy.expert, passed(copy))
                         : host_->unpin(copy.expert);
    }
    for (const CopyJobPtr& job : jobs) host_->unpin(job->expert);
}

}  // namespace moeinf
