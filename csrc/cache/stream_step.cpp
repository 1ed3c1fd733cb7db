#include "cache/stream_step.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "base/error.h"
#include "base/sizes.h"
#include "tier/device_transport.h"

namespace moeinf {
namespace {

size_t pages(size_t nbytes) {
    return round_up(std::max<size_t>(nbytes, 1), kPage);
}

std::unique_ptr<Arena> pinned(Device& device, size_t nbytes) {
    const size_t whole = pages(nbytes);
    auto arena = device.make_pinned_arena(whole, whole);
    arena->commit(whole);
    return arena;
}

DeviceTransport& transport_of(const std::shared_ptr<ExpertCache>& cache) {
    if (cache == nullptr || cache->device_transport() == nullptr) {
        throw Error(ErrorCode::kInvalid, "a device reader needs a cache with slots on a device");
    }
    return *cache->device_transport();
}

}  // namespace

DeviceReader::DeviceReader(std::shared_ptr<ExpertCache> cache, Stream stream)
    : cache_(std::move(cache)),
      transport_(transport_of(cache_)),
      device_(transport_.device()),
      timeline_(std::make_shared<Timeline>(device_, stream, false)),
      position_of_(static_cast<size_t>(cache_->catalog().num_experts()), -1) {
    maps_ = pinned(*device_, kMaps * position_of_.size() * sizeof(int32_t));
}

DeviceReader::~DeviceReader() {
    release();
    bool passed = false;
    try {
        passed = timeline_->reached_within(timeline_->mark(), Timeline::kShutdownTimeout);
    } catch (const std::exception&) {
        passed = true;  // a device that only answers with errors copies nothing any more
    }
    if (passed) return;
    (void)maps_.release();  // memory under a copy must stay
    (void)ids_.release();
}

void DeviceReader::reserve(size_t id_bytes) {
    if (ids_ && ids_->committed() >= id_bytes) return;
    ids_ = pinned(*device_, 2 * id_bytes);
}

size_t DeviceReader::id_count() const noexcept {
    return static_cast<size_t>(step_.tokens) * static_cast<size_t>(step_.top_k);
}

void DeviceReader::ask(const DeviceStep& step) {
    release();
    if (step.tokens < 1 || step.top_k < 1) {
        throw Error(ErrorCode::kInvalid, "expected at least 1 token and 1 expert each, found " +
                                             std::to_string(step.tokens) + " and " +
                                             std::to_string(step.top_k));
    }
    // Ids that were asked for and given up may still be on their way to where the next ones go.
    if (ids_point_) timeline_->synchronize(*ids_point_);
    step_ = step;
    const size_t nbytes = id_count() * (step_.ids_are_int64 ? 8 : 4);
    reserve(nbytes);
    device_->copy_out(ids_->data(), step_.ids, nbytes, timeline_->stream());
    ids_point_ = timeline_->mark();
}

void DeviceReader::read_ids() {
    if (!ids_point_) throw Error(ErrorCode::kInvalid, "begin() without ids asked for");
    timeline_->synchronize(*ids_point_);
    ids_point_.reset();

    const size_t count = id_count();
    experts_.clear();
    counts_.clear();
    const auto num_experts = static_cast<int64_t>(position_of_.size());
    for (size_t i = 0; i < count; ++i) {
        int64_t id = 0;
        if (step_.ids_are_int64) {
            std::memcpy(&id, ids_->data() + i * 8, 8);
        } else {
            int32_t narrow = 0;
            std::memcpy(&narrow, ids_->data() + i * 4, 4);
            id = narrow;
        }
        if (id < 0) continue;
        if (id >= num_experts) {
            for (const ExpertIndex expert : experts_) position_of_[index(expert)] = -1;
            throw Error(ErrorCode::kInvalid,
                        "expected experts in 0.." + std::to_string(num_experts - 1) + " of layer " +
                            std::to_string(number(step_.layer)) + ", found " + std::to_string(id));
        }
        int32_t& position = position_of_[static_cast<size_t>(id)];
        if (position < 0) {
            position = static_cast<int32_t>(experts_.size());
            experts_.push_back(ExpertIndex(id));
            counts_.push_back(0);
        }
        ++counts_[static_cast<size_t>(position)];
    }
    for (const ExpertIndex expert : experts_) position_of_[index(expert)] = -1;
}

void DeviceReader::begin() {
    read_ids();
    lease_.emplace(cache_->begin({.layer = step_.layer,
                                  .experts = experts_,
                                  .counts = counts_,
                                  .prefill = step_.prefill,
                                  .new_sequence = step_.new_sequence}));
    more_ = true;
}

bool DeviceReader::next() {
    if (!lease_) throw Error(ErrorCode::kInvalid, "next() without a step");
    if (!wave_.empty()) done();
    if (ready_.empty() && more_) more_ = lease_->next(ready_);
    if (ready_.empty()) return false;

    // Everything that has arrived, else some of what is on its way.
    SlotFences& fences = transport_.fences();
    auto end = ready_.end();
    if (ready_.size() > kMaxArriving) {
        end = std::stable_partition(ready_.begin(), ready_.end(), [&](const ReadyExpert& one) {
            return fences.arrived(one.slot);
        });
        if (end == ready_.begin()) end += kMaxArriving;
    }
    wave_.assign(ready_.begin(), end);
    ready_.erase(ready_.begin(), end);

    const size_t turn = ++maps_used_ % kMaps;
    timeline_->synchronize(map_points_[turn]);  // long passed, but for a step of many waves
    auto* const map = reinterpret_cast<int32_t*>(maps_->data()) + turn * position_of_.size();
    std::fill_n(map, position_of_.size(), -1);
    for (const ReadyExpert& one : wave_) {
        map[number(experts_[static_cast<size_t>(one.position)])] = number(one.slot);
        fences.before_read(one.slot, timeline_->stream());
    }
    device_->copy_in(step_.map, reinterpret_cast<const std::byte*>(map),
                     position_of_.size() * sizeof(int32_t), timeline_->stream());
    return true;
}

void DeviceReader::done() {
    if (wave_.empty()) return;
    const uint64_t point = timeline_->mark();
    map_points_[maps_used_ % kMaps] = point;
    for (const ReadyExpert& one : wave_) transport_.fences().read(one.slot, timeline_, point);
    if (wave_is_whole()) {  // as most are: one lock for all
        lease_->release();
        more_ = false;
    } else {
        for (const ReadyExpert& one : wave_) lease_->done(one.position);
    }
    wave_.clear();
}

void DeviceReader::release() noexcept {
    if (!lease_) return;
    try {
        done();  // something may have been enqueued that reads them
    } catch (const std::exception&) {
        wave_.clear();
    }
    ready_.clear();
    lease_.reset();
}

void DeviceReader::synchronize() {
    timeline_->synchronize(timeline_->mark());
}

const std::byte* DeviceReader::ids() const noexcept {
    return ids_ ? ids_->data() : nullptr;
}

}  // namespace moeinf
