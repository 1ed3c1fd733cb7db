// Leases for C: steps of a cache, and the streams of a GPU that read their slots.
#include <utility>

#include "capi/border.h"
#include "capi/objects.h"
#include "tier/device_link.h"

namespace moeinf::capi {

Handles<moeinf_lease, Lease>& leases() {
    static auto* const kept = new Handles<moeinf_lease, Lease>("moeinf_lease");
    return *kept;
}

int64_t caller_of(int64_t given) {
    static thread_local const char self = 0;
    return given != 0 ? given : static_cast<int64_t>(reinterpret_cast<uintptr_t>(&self));
}

namespace {

std::shared_ptr<Lease> begin(moeinf_cache* cache, const moeinf_step* step, bool all_at_once) {
    const moeinf_step given = read_struct(step, "moeinf_step");
    if (given.num_experts < 0) {
        invalid("expected a number of experts, found " + std::to_string(given.num_experts));
    }
    const auto count = static_cast<size_t>(given.num_experts);
    if (count > 0) check_given(given.experts, "experts");
    std::shared_ptr<Cache> own = caches().get(cache);
    std::vector<ExpertIndex> experts(count);
    for (size_t i = 0; i < count; ++i) experts[i] = ExpertIndex{given.experts[i]};
    StepRequest request{.layer = LayerId{given.layer},
                        .experts = experts,
                        .prefill = given.prefill != 0,
                        .new_sequence = given.new_sequence != 0,
                        .caller = caller_of(given.caller),
                        .all_at_once = all_at_once};
    if (given.counts != nullptr) request.counts = {given.counts, count};
    StepLease started = own->core.begin_step(request);
    // Not make_shared: a lease holds a mutex, and aggregates with one are made in place.
    return std::shared_ptr<Lease>(new Lease{.cache = std::move(own),
                                            .mutex = {},
                                            .experts = std::move(experts),
                                            .slots = std::vector<SlotId>(count, SlotId::kNone),
                                            .left = given.num_experts,
                                            .step = std::move(started)});
}

// Under the lease's lock.
void hand_out(Lease& lease, const std::vector<ReadyExpert>& found, moeinf_ready* ready) {
    for (const ReadyExpert& one : found) {
        lease.slots[static_cast<size_t>(one.position)] = one.slot;
        *ready++ = {one.position, number(one.slot), lease.cache->core.pool().slot(one.slot)};
    }
    lease.left -= static_cast<int32_t>(found.size());
}

template <class Take>
moeinf_status take(moeinf_lease* handle, moeinf_ready* ready, int32_t* count, int32_t* left,
                   const Take& from) {
    return guarded([&] {
        check_given(ready, "a place for ready experts");
        check_given(count, "a place for their number");
        const auto lease = leases().get(handle);
        const std::lock_guard lock(lease->mutex);
        std::vector<ReadyExpert> found;
        from(lease->step, found);
        hand_out(*lease, found, ready);
        *count = static_cast<int32_t>(found.size());
        if (left != nullptr) *left = lease->left;
    });
}

// The next fill of these slots waits for what is now enqueued on the stream.
void end_reads(Lease& lease, std::span<const SlotId> slots, Stream stream) {
    DeviceLink* const link = lease.cache->core.device_link();
    if (link == nullptr) return;
    const TimelinePtr timeline = lease.cache->timeline_of(stream);
    const uint64_t point = timeline->signal();
    for (const SlotId slot : slots) {
        if (is_some(slot)) link->fences().read(slot, timeline, point);
    }
}

}  // namespace
}  // namespace moeinf::capi

using namespace moeinf;
using namespace moeinf::capi;

extern "C" {

moeinf_status moeinf_acquire(moeinf_cache* cache, const moeinf_step* step, moeinf_ready* ready,
                             moeinf_lease** lease) {
    return guarded([&] {
        check_given(lease, "a place for the lease");
        check_given(ready, "a place for ready experts");
        const auto own = begin(cache, step, true);
        std::vector<ReadyExpert> found;
        own->step.acquire_all(found);
        hand_out(*own, found, ready);
        *lease = leases().add(own);
    });
}

moeinf_status moeinf_begin(moeinf_cache* cache, const moeinf_step* step, moeinf_lease** lease) {
    return guarded([&] {
        check_given(lease, "a place for the lease");
        *lease = leases().add(begin(cache, step, false));
    });
}

moeinf_status moeinf_lease_wait(moeinf_lease* lease, moeinf_ready* ready, int32_t* count,
                                int32_t* left) {
    return take(lease, ready, count, left,
                [](StepLease& step, auto& found) { (void)step.wait_ready(found); });
}

moeinf_status moeinf_lease_try(moeinf_lease* lease, moeinf_ready* ready, int32_t* count,
                               int32_t* left) {
    return take(lease, ready, count, left,
                [](StepLease& step, auto& found) { step.take_ready(found); });
}

moeinf_status moeinf_lease_use_on(moeinf_lease* lease, void* stream) {
    return guarded([&] {
        const auto own = leases().get(lease);
        const std::lock_guard lock(own->mutex);
        DeviceLink* const link = own->cache->core.device_link();
        if (link == nullptr) return;
        for (const SlotId slot : own->slots) {
            if (is_some(slot)) link->fences().before_read(slot, stream);
        }
    });
}

moeinf_status moeinf_lease_release_one(moeinf_lease* lease, int32_t position, void* stream) {
    return guarded([&] {
        const auto own = leases().get(lease);
        const std::lock_guard lock(own->mutex);
        if (position < 0 || static_cast<size_t>(position) >= own->slots.size() ||
            !is_some(own->slots[static_cast<size_t>(position)])) {
            invalid("position " + std::to_string(position) + " of a step of " +
                    std::to_string(own->slots.size()) + " experts is not handed out");
        }
        SlotId& slot = own->slots[static_cast<size_t>(position)];
        end_reads(*own, {&slot, 1}, stream);
        slot = SlotId::kNone;
        own->step.release(position);
    });
}

moeinf_status moeinf_lease_release(moeinf_lease* lease, void* stream) {
    return guarded([&] {
        const auto own = leases().take(lease);
        const std::lock_guard lock(own->mutex);  // a call that still waits with it ends first
        end_reads(*own, own->slots, stream);
        own->step.release();
    });
}
}
