#include "cache/stream_step.h"

#include <algorithm>
#include <string>

#include "base/error.h"
#include "base/ranges.h"
#include "base/sizes.h"
#include "tier/device_link.h"

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

DeviceLink& link_of(const std::shared_ptr<ExpertCache>& cache) {
    if (cache == nullptr || cache->device_link() == nullptr) {
        throw Error(ErrorCode::kInvalid, "a step stream needs a cache with slots on a device");
    }
    return *cache->device_link();
}

}  // namespace

StepStream::StepStream(std::shared_ptr<ExpertCache> cache, Stream stream)
    : cache_(std::move(cache)),
      link_(link_of(cache_)),
      device_(link_.device()),
      timeline_(std::make_shared<Timeline>(device_, stream, false)),
      routing_(cache_->catalog().num_experts()) {
    maps_ = pinned(*device_, kMaps * map_entries() * sizeof(int32_t));
}

StepStream::~StepStream() {
    release();
    bool passed = false;
    try {
        passed = timeline_->is_complete_within(timeline_->signal(), Timeline::kShutdownTimeout);
    } catch (const std::exception&) {
        passed = true;  // a device that only answers with errors copies nothing any more
    }
    if (passed) return;
    (void)maps_.release();  // memory under a copy must stay
    (void)ids_.release();
}

size_t StepStream::map_entries() const noexcept {
    return static_cast<size_t>(cache_->catalog().num_experts()) + 1;
}

void StepStream::reserve(size_t id_bytes) {
    if (ids_ && ids_->committed() >= id_bytes) return;
    ids_ = pinned(*device_, 2 * id_bytes);
}

void StepStream::copy_ids(const RoutedStep& step) {
    release();
    if (step.tokens < 1 || step.top_k < 1) {
        throw Error(ErrorCode::kInvalid, "expected at least 1 token and 1 expert each, found " +
                                             std::to_string(step.tokens) + " and " +
                                             std::to_string(step.top_k));
    }
    // Ids that were copied and given up may still be on their way to where the next ones go.
    if (ids_point_) timeline_->synchronize(*ids_point_);
    step_ = step;
    const size_t nbytes = static_cast<size_t>(step.tokens) * static_cast<size_t>(step.top_k) *
                          (step.ids_are_int64 ? 8 : 4);
    reserve(nbytes);
    device_->copy_out(ids_->data(), step.ids, nbytes, timeline_->stream());
    ids_point_ = timeline_->signal();
}

template <class Use>
auto StepStream::with_ids(const Use& use) {
    const std::byte* const ids = ids_->data();
    return step_.ids_are_int64 ? use(reinterpret_cast<const int64_t*>(ids))
                               : use(reinterpret_cast<const int32_t*>(ids));
}

void StepStream::read_ids() {
    if (!ids_point_) throw Error(ErrorCode::kInvalid, "begin() without copy_ids()");
    const Range range("moeinf router ids");
    timeline_->synchronize(*ids_point_);
    ids_point_.reset();
    with_ids([&](const auto* ids) { routing_.read(ids, step_.tokens, step_.top_k); });
}

std::optional<Wave> StepStream::begin() {
    read_ids();
    std::span<const float> recent;
    if (step_.prefill && Routing::is_long(step_.tokens, step_.top_k, map_entries() - 1)) {
        recent = with_ids(
            [&](const auto* ids) { return routing_.recent(ids, step_.tokens, step_.top_k, 1); });
    }
    lease_.emplace(cache_->begin_step({.layer = step_.layer,
                                       .experts = routing_.experts(),
                                       .counts = routing_.counts(),
                                       .recent = recent,
                                       .prefill = step_.prefill,
                                       .new_sequence = step_.new_sequence,
                                       .caller = step_.caller}));
    more_ = true;
    return take_wave();
}

std::optional<Wave> StepStream::next() {
    if (!lease_) throw Error(ErrorCode::kInvalid, "next() without a step");
    return take_wave();
}

std::optional<Wave> StepStream::take_wave() {
    try {
        if (!wave_.empty()) end_wave();
        if (ready_.empty() && more_) more_ = lease_->wait_ready(ready_);
        if (ready_.empty()) {
            lease_.reset();
            return std::nullopt;
        }

        // Everything that has arrived, else some of what is on its way.
        SlotFences& fences = link_.fences();
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
        auto* const map = reinterpret_cast<int32_t*>(maps_->data()) + turn * map_entries();
        std::fill_n(map, map_entries(), -1);
        for (const ReadyExpert& one : wave_) {
            map[number(routing_.experts()[static_cast<size_t>(one.position)])] = number(one.slot);
            fences.before_read(one.slot, timeline_->stream());
        }
        device_->copy_in(step_.map, reinterpret_cast<const std::byte*>(map),
                         map_entries() * sizeof(int32_t), timeline_->stream());
    } catch (...) {
        release();
        throw;
    }
    return Wave{.whole = wave_.size() == routing_.experts().size(),
                .names_past_the_end = routing_.names_past_the_end(),
                .slots = cache_->slots()};
}

void StepStream::end_wave() {
    const uint64_t point = timeline_->signal();
    map_points_[maps_used_ % kMaps] = point;
    for (const ReadyExpert& one : wave_) link_.fences().read(one.slot, timeline_, point);
    if (wave_.size() == routing_.experts().size()) {  // as most are: one lock for all
        lease_->release();
        more_ = false;
    } else {
        for (const ReadyExpert& one : wave_) lease_->release(one.position);
    }
    wave_.clear();
}

void StepStream::release() noexcept {
    if (!lease_) return;
    try {
        if (!wave_.empty()) end_wave();  // something may have been enqueued that reads them
    } catch (const std::exception&) {
    }
    wave_.clear();
    ready_.clear();
    lease_.reset();
}

void StepStream::synchronize() {
    timeline_->synchronize(timeline_->signal());
}

const std::byte* StepStream::ids() const noexcept {
    return ids_ ? ids_->data() : nullptr;
}

}  // namespace moeinf
