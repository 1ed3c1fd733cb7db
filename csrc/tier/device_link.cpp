#include "tier/device_link.h"

#include <algorithm>
#include <exception>
#include <ranges>
#include <utility>

#include "base/error.h"
#include "base/ranges.h"
#include "base/sizes.h"
#include "tier/copy_job.h"
#include "tier/tier.h"

namespace moeinf {
namespace {

// Bytes from the start of the slot to the end of its last segment: one copy moves all segments.
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

DeviceLink::DeviceLink(Tier& tier, std::shared_ptr<Device> device, std::shared_ptr<HostTier> host,
                       size_t gather_below, Arrived arrived)
    : Source(true),
      tier_(tier),
      device_(std::move(device)),
      host_(std::move(host)),
      copy_bytes_(copied_bytes(*tier.catalog())),
      gather_below_(device_->can_gather() ? gather_below : 0),
      arrived_(std::move(arrived)),
      demand_(own_timeline(device_, true)),
      prefetch_(own_timeline(device_, false)),
      out_(own_timeline(device_, false)),
      fences_(tier.pool().capacity()),
      holds_(tier.catalog()->total_experts()),
      worker_([this](const std::stop_token& stop) { work(stop); }) {}

// Executes commands in their order, so a demotion is enqueued before the next fill of its slot.
void DeviceLink::execute(std::span<const Command> commands) noexcept {
    const auto demotes = [this](const Command& command) {
        return command.kind == Command::Kind::kEvict && is_some(command.slot) &&
               host_->accepts_demotion(command.expert);
    };
    if (std::any_of(commands.begin(), commands.end(), demotes)) {
        (void)unpin_passed();  // experts that have arrived make room for demotions
    }
    for (const Command& command : commands) {
        switch (command.kind) {
            case Command::Kind::kFill:
                start(command.fill);
                break;
            case Command::Kind::kPromote:
                if (command.fill->job) {
                    promote_job(std::static_pointer_cast<CopyJob>(command.fill->job));
                }
                break;
            case Command::Kind::kEvict:
                demote(command.expert, command.slot);
                break;
        }
    }
    copy_demands(demands_);
    demands_.clear();
}

void DeviceLink::start(const FillPtr& fill) {
    const auto job = std::make_shared<CopyJob>(*this, fill);
    fill->job = job;
    const std::optional<PinnedExpert> pinned = host_->pin(job, job->priority);
    if (!pinned) {
        ++waiting_in_host_;
        return;
    }
    job->source = *pinned;
    if (job->priority == Priority::kDemand) {
        demands_.push_back(job);
    } else {
        queue_prefetch(job);
    }
}

void DeviceLink::promote_job(const CopyJobPtr& job) {
    if (job->fill == nullptr || job->priority == Priority::kDemand) return;
    job->priority = Priority::kDemand;
    if (job->source.bytes == nullptr) return host_->promote(*job);
    if (job->copied < copy_bytes_) {
        std::erase(prefetches_, job);
        return demands_.push_back(job);
    }
    std::erase(arriving_, job);
    unpin_behind(job, prefetch_, job->last_chunk, job->fill->priority);
    finish(job, {});
}

void DeviceLink::CopyJob::on_pinned(const PinnedExpert& pinned, const std::string& error) noexcept {
    link.on_pinned(std::static_pointer_cast<CopyJob>(shared_from_this()), pinned, error);
}

void DeviceLink::on_pinned(const CopyJobPtr& job, const PinnedExpert& pinned,
                           const std::string& error) {
    const std::lock_guard lock(issuing);
    --waiting_in_host_;
    told_.notify_all();
    if (!error.empty()) return finish(job, error);
    if (ending_) {
        host_->unpin(job->expert);
        return finish(job, kEnding);
    }
    job->source = pinned;
    if (job->priority == Priority::kDemand) {
        copy_demands({&job, 1});
    } else {
        queue_prefetch(job);
    }
}

void DeviceLink::queue_prefetch(const CopyJobPtr& job) {
    prefetches_.push_back(job);
    wake_worker();
}

// Enqueues a copy of the next `nbytes` of the expert.
void DeviceLink::enqueue(const CopyJobPtr& job, size_t nbytes, Stream stream) {
    device_->copy_in(tier_.pool().slot(job->slot) + job->copied, job->source.bytes + job->copied,
                     nbytes, stream);
    job->copied += nbytes;
    const std::lock_guard lock(queues_);
    ++stats_.copies;
    stats_.copied_bytes += static_cast<int64_t>(nbytes);
}

// Enqueues all copies and marks one point after them.
void DeviceLink::copy_demands(std::span<const CopyJobPtr> demands) noexcept {
    const Range range("moeinf copy");
    const bool gather = demands.size() > 1 && copy_bytes_ <= gather_below_;
    std::vector<GatherPart> parts;
    const Stream stream = demand_->stream();
    for (const CopyJobPtr& job : demands) {
        try {
            job->wait_for_source(stream);
            if (job->copied > 0) prefetch_->wait_on(stream, prefetch_->signal());
            if (job->copied == 0) fences_.before_fill(job->slot, stream);
            if (gather && job->copied == 0) {
                parts.push_back({job->source.bytes, tier_.pool().slot(job->slot), copy_bytes_});
            } else {
                enqueue(job, copy_bytes_ - job->copied, stream);
            }
        } catch (const std::exception& error) {
            abandon(job, demand_, error.what());
        }
    }
    const auto enqueued = [](const CopyJobPtr& job) { return job->fill != nullptr; };
    if (std::none_of(demands.begin(), demands.end(), enqueued)) return;
    try {
        for (size_t first = 0; first < parts.size(); first += Device::kMaxGatherParts) {
            const size_t count = std::min(Device::kMaxGatherParts, parts.size() - first);
            device_->gather(std::span(parts).subspan(first, count), stream);
            const std::lock_guard lock(queues_);
            ++stats_.gathers;
            stats_.copied_bytes += static_cast<int64_t>(count * copy_bytes_);
        }
        const uint64_t point = demand_->signal();
        for (const CopyJobPtr& job : demands | std::views::filter(enqueued)) {
            fences_.filled(job->slot, demand_, point);
            unpin_behind(job, demand_, point, job->fill->priority);
        }
    } catch (const std::exception& error) {
        for (const CopyJobPtr& job : demands | std::views::filter(enqueued)) {
            abandon(job, demand_, error.what());
        }
        return;
    }
    for (const CopyJobPtr& job : demands | std::views::filter(enqueued)) finish(job, {});
}

void DeviceLink::demote(ExpertId expert, SlotId slot) {
    set_holder(expert, false);
    if (!is_some(slot)) return;
    std::byte* const target = host_->accept_demotion(expert);
    if (target == nullptr) return;
    uint64_t point = 0;
    bool enqueued = false;
    try {
        // No wait for the slot's fill is needed: RAM pins an expert while it is filled, and a
        // pinned expert is not accepted for demotion.
        device_->copy_out(target, tier_.pool().slot(slot), copy_bytes_, out_->stream());
        enqueued = true;
        point = out_->signal();
        fences_.read(slot, out_, point);
    } catch (const std::exception&) {
        try {
            // The bytes and the slot are in use until this copy is over. If nothing can be
            // enqueued, no copy is in flight.
            if (enqueued) out_->synchronize(out_->signal());
        } catch (const std::exception&) {
        }
        return host_->abort_demotion(expert);  // the expert is still in the files
    }
    host_->demotion_enqueued(expert, out_, point);
    add_in_flight({expert, out_, point, true, {}});
    const std::lock_guard lock(queues_);
    stats_.demoted_bytes += static_cast<int64_t>(copy_bytes_);
}

void DeviceLink::finish(const CopyJobPtr& job, std::string error) {
    const FillPtr fill = std::exchange(job->fill, nullptr);
    if (error.empty()) set_holder(job->expert, true);
    tier_.end_fill(*fill, std::move(error));
}

void DeviceLink::set_holder(ExpertId expert, bool holds) {
    if ((holds_[expert] != 0) == holds) return;
    holds_[expert] = holds ? 1 : 0;
    holds ? host_->add_holder(expert) : host_->remove_holder(expert);
}

// A part of the copy may be in flight on `timeline`. Its bytes and its slot are in use until then.
void DeviceLink::abandon(const CopyJobPtr& job, const TimelinePtr& timeline,
                         const char* why) noexcept {
    try {
        const uint64_t point = timeline->signal();
        fences_.filled(job->slot, timeline, point);
        unpin_behind(job, timeline, point, {});
    } catch (const std::exception&) {
        host_->unpin(job->expert);  // if nothing can be enqueued, no copy is in flight
    }
    finish(job, why);
}

void DeviceLink::unpin_behind(const CopyJobPtr& job, const TimelinePtr& timeline, uint64_t point,
                              std::optional<Priority> arrives) {
    add_in_flight({job->expert, timeline, point, false, arrives});
}

void DeviceLink::add_in_flight(InFlight copy) {
    const std::lock_guard lock(queues_);
    in_flight_.push_back(std::move(copy));
    awake_ = true;
    wake_.notify_all();
}

void DeviceLink::wake_worker() {
    const std::lock_guard lock(queues_);
    awake_ = true;
    wake_.notify_all();
}

LinkStats DeviceLink::stats() const {
    const std::lock_guard lock(queues_);
    return stats_;
}

void DeviceLink::reset_stats() {
    const std::lock_guard lock(queues_);
    stats_ = {};
}

}  // namespace moeinf
