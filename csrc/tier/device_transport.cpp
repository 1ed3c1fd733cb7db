#include "tier/device_transport.h"

#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <ranges>
#include <utility>

#include "base/error.h"
#include "base/sizes.h"

namespace moeinf {
namespace {

using namespace std::chrono_literals;

constexpr auto kPollCopies = 20us;

// From the start of the slot to the end of its last segment: one copy for all.
size_t copied_bytes(const Catalog& catalog) {
    size_t end = 0;
    for (const Extent& extent : catalog.extents(ExpertId{0})) {
        end = std::max<size_t>(end, extent.slot_offset + extent.nbytes);
    }
    return round_up(end, kGatherUnit);
}

TimelinePtr own_timeline(const std::shared_ptr<Device>& device, bool urgent) {
    return std::make_shared<Timeline>(device, device->create_stream(urgent), true);
}

}  // namespace

struct DeviceTransport::Job : Transfer {
    SlotId slot = SlotId::kNone;
    Priority submitted = Priority::kDemand;
    Priority priority = Priority::kDemand;  // guarded by issuing_, as is all that follows
    TransferCallback done;
    std::byte* source = nullptr;  // in the host tier, once it is there
    size_t copied = 0;
    uint64_t last_chunk = 0;  // point of prefetch_, once all is enqueued
    bool ended = false;
};

DeviceTransport::DeviceTransport(std::shared_ptr<const Catalog> catalog,
                                 std::shared_ptr<Device> device, std::shared_ptr<SlotPool> pool,
                                 HostTierOptions host, size_t gather_below, Arrived arrived)
    : catalog_(std::move(catalog)),
      device_(std::move(device)),
      pool_(std::move(pool)),
      copy_bytes_(copied_bytes(*catalog_)),
      gather_below_(device_->can_gather() ? gather_below : 0),
      arrived_(std::move(arrived)),
      demand_(own_timeline(device_, true)),
      prefetch_(own_timeline(device_, false)),
      out_(own_timeline(device_, false)),
      fences_(pool_->capacity()),
      demoted_at_(catalog_->total_experts()),
      host_(std::make_unique<HostTier>(
          catalog_, *device_, std::move(host),
          [this](const TransferPtr& who, std::byte* bytes, const std::string& error) {
              on_host_ready(std::static_pointer_cast<Job>(who), bytes, error);
          })),
      worker_([this](const std::stop_token& stop) { work(stop); }) {}

DeviceTransport::~DeviceTransport() {
    worker_.request_stop();
    worker_.join();
    std::deque<JobPtr> left_over;
    {
        const std::lock_guard lock(issuing_);
        ending_ = true;
        left_over.swap(prefetches_);
        left_over.insert(left_over.end(), arriving_.begin(), arriving_.end());
        arriving_.clear();
        const std::lock_guard queues(queues_);
        for (Request& request : requests_) {
            if (request.kind == Request::Kind::kFill) left_over.push_back(std::move(request.job));
        }
        requests_.clear();
    }
    for (const JobPtr& job : left_over) finish(job, TransferState::kCancelled);
    // Memory under a copy must stay. Where the device never gets there, it is left to the process.
    if (!device_rests()) {
        (void)host_.release();
        (void)new std::shared_ptr<SlotPool>(pool_);
    }
}

// Waits, but not for ever, until the device has done all that it was given.
bool DeviceTransport::device_rests() {
    try {
        for (const TimelinePtr& timeline : {demand_, prefetch_, out_}) {
            if (!timeline->reached_within(timeline->mark(), Timeline::kShutdownTimeout))
                return false;
        }
        const auto give_up = std::chrono::steady_clock::now() + Timeline::kShutdownTimeout;
        while (!fences_.idle(SlotId{0})) {  // streams of readers
            if (std::chrono::steady_clock::now() > give_up) return false;
            std::this_thread::sleep_for(100us);
        }
    } catch (const std::exception&) {
        // A device that only answers with errors copies nothing any more.
    }
    return true;
}

TransferPtr DeviceTransport::submit(ExpertId expert, SlotId slot, Priority priority,
                                    TransferCallback done) {
    auto job = std::make_shared<Job>();
    TransferAccess::begin(*job, expert);
    job->slot = slot;
    job->submitted = job->priority = priority;
    job->done = std::move(done);
    const std::lock_guard lock(queues_);
    requests_.push_back({Request::Kind::kFill, job, expert, slot});
    queued_.store(true, std::memory_order_release);
    return job;
}

void DeviceTransport::promote(const TransferPtr& transfer) {
    const std::lock_guard lock(queues_);
    requests_.push_back({Request::Kind::kPromote, std::static_pointer_cast<Job>(transfer),
                         transfer->expert(), SlotId::kNone});
    queued_.store(true, std::memory_order_release);
}

void DeviceTransport::left(ExpertId expert, SlotId slot) {
    const std::lock_guard lock(queues_);
    requests_.push_back({Request::Kind::kLeft, nullptr, expert, slot});
    queued_.store(true, std::memory_order_release);
}

void DeviceTransport::flush() noexcept {
    if (!has_queued()) return;
    const std::lock_guard lock(issuing_);
    {
        const std::lock_guard queues(queues_);
        flushed_.swap(requests_);
    }
    const auto leaves = [this](const Request& one) {
        return one.kind == Request::Kind::kLeft && host_->wants(one.expert);
    };
    if (std::any_of(flushed_.begin(), flushed_.end(), leaves)) {
        (void)release_passed();  // what has arrived makes room for what leaves
    }
    for (const Request& request : flushed_) carry_out(request, demands_);
    copy_demands(demands_);
    flushed_.clear();
    demands_.clear();
    const std::lock_guard queues(queues_);
    queued_.store(!requests_.empty(), std::memory_order_release);
}

// In the order in which they were noted: a demotion is enqueued before the slot is filled anew.
void DeviceTransport::carry_out(const Request& request, std::vector<JobPtr>& demands) {
    switch (request.kind) {
        case Request::Kind::kLeft:
            return demote(request.expert, request.slot);
        case Request::Kind::kFill:
            return start(request.job, demands);
        case Request::Kind::kPromote:
            break;
    }
    const JobPtr& job = request.job;
    if (job->ended || job->priority == Priority::kDemand) return;
    job->priority = Priority::kDemand;
    if (job->source == nullptr) return host_->promote(request.expert);
    if (job->copied < copy_bytes_) {
        std::erase(prefetches_, job);
        return demands.push_back(job);
    }
    std::erase(arriving_, job);
    hold_until(job->expert(), prefetch_, job->last_chunk, job->submitted);
    finish(job, TransferState::kDone);
}

void DeviceTransport::start(const JobPtr& job, std::vector<JobPtr>& demands) {
    std::byte* bytes = nullptr;
    try {
        bytes = host_->hold(job, job->priority);
    } catch (const std::exception& error) {
        return finish(job, TransferState::kFailed, error.what());
    }
    if (bytes == nullptr) return;
    job->source = bytes;
    if (job->priority == Priority::kDemand) {
        demands.push_back(job);
    } else {
        prefetches_.push_back(job);
        const std::lock_guard lock(queues_);
        awake_ = true;
        wake_.notify_all();
    }
}

void DeviceTransport::on_host_ready(const JobPtr& job, std::byte* bytes, const std::string& error) {
    const std::lock_guard lock(issuing_);
    if (bytes == nullptr) return finish(job, TransferState::kFailed, error);
    if (ending_) {
        host_->release(job->expert());
        return finish(job, TransferState::kCancelled);
    }
    job->source = bytes;
    if (job->priority == Priority::kDemand) {
        return copy_demands({&job, 1});
    }
    prefetches_.push_back(job);
    const std::lock_guard queues(queues_);
    awake_ = true;
    wake_.notify_all();
}

// Enqueues the next `nbytes` of the expert.
void DeviceTransport::enqueue(const JobPtr& job, size_t nbytes, Stream stream) {
    device_->copy_in(pool_->slot(job->slot) + job->copied, job->source + job->copied, nbytes,
                     stream);
    job->copied += nbytes;
    const std::lock_guard lock(queues_);
    ++stats_.copies;
    stats_.copied_bytes += static_cast<int64_t>(nbytes);
}

// All of them, then one mark for all.
void DeviceTransport::copy_demands(std::span<const JobPtr> demands) noexcept {
    const bool gather = demands.size() > 1 && copy_bytes_ <= gather_below_;
    std::vector<GatherPart> parts;
    for (const JobPtr& job : demands) {
        try {
            const Stream stream = demand_->stream();
            out_->hold_back(stream, demoted_at_[job->expert()]);
            if (job->copied > 0) prefetch_->hold_back(stream, prefetch_->mark());
            if (job->copied == 0) fences_.before_fill(job->slot, stream);
            if (gather && job->copied == 0) {
                parts.push_back({job->source, pool_->slot(job->slot), copy_bytes_});
            } else {
                enqueue(job, copy_bytes_ - job->copied, stream);
            }
        } catch (const std::exception& error) {
            abandon(job, demand_, error.what());
        }
    }
    const auto enqueued = [](const JobPtr& job) { return !job->ended; };
    if (std::none_of(demands.begin(), demands.end(), enqueued)) return;
    try {
        for (size_t first = 0; first < parts.size(); first += Device::kMaxGatherParts) {
            const size_t count = std::min(Device::kMaxGatherParts, parts.size() - first);
            device_->gather(std::span(parts).subspan(first, count), demand_->stream());
            const std::lock_guard lock(queues_);
            ++stats_.gathers;
            stats_.copied_bytes += static_cast<int64_t>(count * copy_bytes_);
        }
        const uint64_t point = demand_->mark();
        for (const JobPtr& job : demands | std::views::filter(enqueued)) {
            fences_.filled(job->slot, demand_, point);
            hold_until(job->expert(), demand_, point, job->submitted);
        }
    } catch (const std::exception& error) {
        for (const JobPtr& job : demands | std::views::filter(enqueued)) {
            abandon(job, demand_, error.what());
        }
        return;
    }
    for (const JobPtr& job : demands | std::views::filter(enqueued)) {
        finish(job, TransferState::kDone);
    }
}

void DeviceTransport::demote(ExpertId expert, SlotId slot) {
    host_->set_on_device(expert, false);
    if (!is_some(slot)) return;
    std::byte* const target = host_->take_over(expert);
    if (target == nullptr) return;
    try {
        // No wait for the slot's fill: while that was under way the host tier held the expert, and
        // would not have taken over what it holds.
        device_->copy_out(target, pool_->slot(slot), copy_bytes_, out_->stream());
        const uint64_t point = out_->mark();
        fences_.read(slot, out_, point);
        demoted_at_[expert] = point;
        hold_until(expert, out_, point);
        const std::lock_guard lock(queues_);
        stats_.demoted_bytes += static_cast<int64_t>(copy_bytes_);
    } catch (const std::exception&) {
        host_->drop(expert);  // the files still have it
    }
}

void DeviceTransport::finish(const JobPtr& job, TransferState state, std::string error) {
    job->ended = true;
    TransferCallback done = std::exchange(job->done, nullptr);
    if (state == TransferState::kDone) host_->set_on_device(job->expert(), true);
    TransferAccess::set_error(*job, std::move(error));
    TransferAccess::set_state(*job, state);
    if (done) done(job);
}

// Part of it may be under way on `timeline`: neither its bytes nor its slot are free before that.
void DeviceTransport::abandon(const JobPtr& job, const TimelinePtr& timeline,
                              const char* why) noexcept {
    try {
        const uint64_t point = timeline->mark();
        fences_.filled(job->slot, timeline, point);
        hold_until(job->expert(), timeline, point);
    } catch (const std::exception&) {
        host_->release(job->expert());  // where nothing can be enqueued, nothing is under way
    }
    finish(job, TransferState::kFailed, why);
}

void DeviceTransport::hold_until(ExpertId expert, const TimelinePtr& timeline, uint64_t point,
                                 std::optional<Priority> arrives) {
    const std::lock_guard lock(queues_);
    held_.push_back({expert, timeline, point, arrives});
    awake_ = true;
    wake_.notify_all();
}

LinkStats DeviceTransport::link_stats() const {
    const std::lock_guard lock(queues_);
    return stats_;
}

void DeviceTransport::reset_stats() {
    host_->reset_stats();
    const std::lock_guard lock(queues_);
    stats_ = {};
}

// The worker: releases what copies have passed, and keeps the prefetch window full.
void DeviceTransport::work(const std::stop_token& stop) {
#ifdef __linux__
    (void)prctl(PR_SET_TIMERSLACK, 1000UL);  // else 20 us of sleep are 70
#endif
    device_->leave_captures_alone();
    while (!stop.stop_requested()) {
        const bool pumping = pump_prefetches();
        const bool holding = release_passed();
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

// True if something is still held.
bool DeviceTransport::release_passed() {
    std::vector<Held> passed;
    bool holding = false;
    {
        const std::lock_guard lock(queues_);
        const Timeline* late = nullptr;  // found not to have reached this point, nor any after it
        uint64_t late_point = 0;
        std::erase_if(held_, [&](const Held& one) {
            if (one.timeline.get() == late && one.point >= late_point) return false;
            try {
                if (!one.timeline->reached(one.point)) {
                    late = one.timeline.get();
                    late_point = one.point;
                    return false;
                }
            } catch (const std::exception&) {
                return false;  // a device in this state moves nothing: better held for ever
            }
            passed.push_back(one);
            return true;
        });
        holding = !held_.empty();
    }
    for (const Held& one : passed) {
        if (arrived_ && one.arrives) arrived_(one.expert, *one.arrives);
        host_->release(one.expert);
    }
    return holding;
}

// True if prefetches are queued or under way.
bool DeviceTransport::pump_prefetches() {
    const std::lock_guard lock(issuing_);
    end_prefetches();
    while (!prefetches_.empty() && window_bytes_ < kWindowBytes && window_.size() < kMaxChunks) {
        const JobPtr job = prefetches_.front();
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

void DeviceTransport::start_chunk(const JobPtr& job) {
    const Stream stream = prefetch_->stream();
    if (job->copied == 0) {
        out_->hold_back(stream, demoted_at_[job->expert()]);
        fences_.before_fill(job->slot, stream);
        TransferAccess::set_state(*job, TransferState::kRunning);
    }
    const size_t nbytes = std::min(kChunkBytes, copy_bytes_ - job->copied);
    enqueue(job, nbytes, stream);
    job->last_chunk = prefetch_->mark();
    window_.push_back({job->last_chunk, nbytes});
    window_bytes_ += nbytes;
    if (job->copied == copy_bytes_) fences_.filled(job->slot, prefetch_, job->last_chunk);
}

// Whose last chunk has arrived.
void DeviceTransport::end_prefetches() {
    while (!window_.empty() && reached_by_prefetches(window_.front().point)) {
        window_bytes_ -= window_.front().nbytes;
        window_.pop_front();
    }
    while (!arriving_.empty() && reached_by_prefetches(arriving_.front()->last_chunk)) {
        const JobPtr job = arriving_.front();
        arriving_.pop_front();
        if (arrived_) arrived_(job->expert(), job->submitted);
        host_->release(job->expert());
        finish(job, TransferState::kDone);
    }
}

bool DeviceTransport::reached_by_prefetches(uint64_t point) noexcept {
    try {
        return prefetch_->reached(point);
    } catch (const std::exception&) {
        return false;
    }
}

}  // namespace moeinf
