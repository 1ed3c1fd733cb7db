// Reads, pins and transit slots: what changes when bytes arrive or holders let go.
#include "cache/cache_state.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/error.h"
#include "tier/file_transport.h"

namespace moeinf {
namespace {

constexpr std::chrono::milliseconds kPollEvery{50};

template <class Iterator>
void number_from(Iterator begin, Iterator end, int32_t first) {
    for (; begin != end; ++begin) *begin = SlotId{first++};
}

std::shared_ptr<SlotPool> make_pool(const Catalog& catalog, int32_t slots, Device* device) {
    const int32_t total = catalog.total_experts();
    if (slots < 1 || slots > total) {
        throw Error(ErrorCode::kInvalid, "a cache for " + std::to_string(total) +
                                             " experts needs 1 to " + std::to_string(total) +
                                             " slots, not " + std::to_string(slots));
    }
    const int32_t capacity = total + ExpertCache::kTransitSlots;
    const uint64_t slot_bytes = catalog.slot_bytes();
    const uint64_t nbytes = static_cast<uint64_t>(capacity) * slot_bytes;
    return std::make_shared<SlotPool>(device ? device->make_arena(nbytes) : make_host_arena(nbytes),
                                      slot_bytes, capacity, slots + ExpertCache::kTransitSlots);
}

const Eamc* checked_eamc(const ExpertCacheOptions& options, ModelShape shape) {
    if (options.eamc == nullptr) return nullptr;
    if (!policy_collects(options.policy) && options.prefetch != "eam") {
        throw Error(ErrorCode::kInvalid, "a collection is for 'eam': policy is '" + options.policy +
                                             "' and prefetch is '" + options.prefetch + "'");
    }
    check_shape(*options.eamc, shape, "the checkpoint");
    return options.eamc.get();
}

const Catalog& checked(const std::shared_ptr<const Catalog>& catalog) {
    if (catalog == nullptr) throw Error(ErrorCode::kInvalid, "a cache needs a catalog");
    return *catalog;
}

}  // namespace

CacheState::CacheState(std::shared_ptr<const Catalog> the_catalog, ExpertCacheOptions options)
    : catalog(std::move(the_catalog)),
      pool(make_pool(checked(catalog), options.slots, options.device.get())),
      poll(std::move(options.poll)),
      residency(
          catalog->shape(), options.slots,
          make_policy(options.policy, catalog->shape(), checked_eamc(options, catalog->shape()))),
      stats(catalog->num_layers()),
      loads(catalog->total_experts()),
      prefetched_unused(loads.size()),
      slot_table(loads.size()),
      seen(loads.size()) {
    for (size_t i = 0; i < transit.size(); ++i) transit[i].slot = SlotId(i);
    number_from(slot_table.begin(), slot_table.end(), ExpertCache::kTransitSlots);
    if (options.device) {
        auto link = std::make_unique<DeviceTransport>(
            catalog, options.device, pool,
            HostTierOptions{options.host_slots, options.policy, options.exclusive, options.copy,
                            options.eamc},
            options.gather_below,
            options.prefetch == "off" ? DeviceTransport::Arrived()
                                      : [this](auto... which) { on_arrival(which...); });
        on_device = link.get();
        transport = std::move(link);
    } else {
        transport = std::make_unique<FileTransport>(catalog, pool, options.copy);
    }
    const Prefetcher::Costs costs{static_cast<int64_t>(catalog->expert_bytes()),
                                  transport->delay_bytes()};
    prefetcher = make_prefetcher(options.prefetch, catalog->shape(), costs, options.eamc.get());
}

void CacheState::check_process() const {
    if (forked()) {
        throw Error(ErrorCode::kUnsupported,
                    "a cache does not survive a fork: make a new one in the child process");
    }
}

void CacheState::wait(std::unique_lock<std::mutex>& lock) {
    if (transport->has_queued()) {  // what starts now may be all there is to wait for
        lock.unlock();
        flush();
        lock.lock();
        return;
    }
    if (!poll) {
        changed.wait(lock);
        return;
    }
    if (changed.wait_for(lock, kPollEvery) == std::cv_status::no_timeout) return;
    lock.unlock();
    try {
        poll();
    } catch (...) {
        lock.lock();
        throw;
    }
    lock.lock();
}

std::shared_ptr<Load> CacheState::start_load(ExpertId expert, int32_t transit_slot,
                                             Priority priority) {
    auto load = std::make_shared<Load>();
    load->expert = expert;
    load->transit = transit_slot;
    load->prefetch = priority == Priority::kPrefetch;
    SlotId slot = SlotId::kNone;
    if (prefetcher) prefetcher->read_started(expert, !load->prefetch, seconds_now());
    if (transit_slot >= 0) {
        slot = transit[static_cast<size_t>(transit_slot)].slot;
        transit[static_cast<size_t>(transit_slot)].load = load;
    } else {
        slot = slot_of(expert);
        residency.pin(expert);
        loads[expert] = load;
    }
    try {
        // The callback cannot overtake this assignment: it needs the lock we hold. The load lives
        // until then: its slot's owner, above, holds it. A small callback needs no memory.
        load->transfer = transport->submit(expert, slot, priority,
                                           [this, load = load.get()](const TransferPtr& transfer) {
                                               on_transfer_end(*load, *transfer);
                                           });
    } catch (const std::exception& error) {
        end_load(*load, Load::State::kFailed, error.what());
    }
    return load;
}

void CacheState::on_transfer_end(Load& load, const Transfer& transfer) {
    const std::lock_guard lock(mutex);
    switch (transfer.state()) {
        case TransferState::kDone:
            return end_load(load, Load::State::kComplete, {});
        case TransferState::kFailed:
            return end_load(load, Load::State::kFailed, transfer.error());
        default:
            return end_load(load, Load::State::kFailed, "the read was cancelled");
    }
}

void CacheState::on_arrival(ExpertId expert, Priority submitted) {
    const std::lock_guard lock(mutex);
    prefetcher->read_ended(expert, submitted == Priority::kDemand, true, seconds_now());
}

void CacheState::end_load(Load& load, Load::State state, std::string error) {
    const std::shared_ptr<Load> keep = std::move(
        load.transit >= 0 ? transit[static_cast<size_t>(load.transit)].load : loads[load.expert]);
    load.state = state;
    load.error = std::move(error);
    load.transfer.reset();
    const bool complete = state == Load::State::kComplete;
    if (prefetcher && !(complete && on_device != nullptr)) {  // else see on_arrival()
        prefetcher->read_ended(load.expert, !load.prefetch, complete, seconds_now());
    }
    if (complete) {
        LayerStats& layer = stats_of(load.expert);
        const auto nbytes = static_cast<int64_t>(catalog->expert_bytes());
        (load.prefetch ? layer.prefetch_bytes : layer.demand_bytes) += nbytes;
        if (load.prefetch && load.wanted) layer.prefetch_useful_bytes += nbytes;
    }
    if (load.transit >= 0) {
        Transit& slot = transit[static_cast<size_t>(load.transit)];
        if (!complete) slot.owner = nullptr;
        if (complete && slot.owner == nullptr) passed(load.expert);
    } else if (complete) {
        prefetched_unused[load.expert] = load.prefetch && !load.wanted;
        unpin(load.expert);
    } else {
        // Those who wait for it learn of the failure from the load; their pins end here.
        for (uint32_t pins = load.waiting + 1; pins > 0; --pins) residency.unpin(load.expert);
        residency.remove(load.expert);
    }
    changed.notify_all();
}

void CacheState::start_prefetches() {
    const std::span<const ExpertId> experts = prefetcher->choose(residency);
    if (experts.empty()) return;
    const std::span<const ExpertId> expected = prefetcher->expected_residents();
    for (const ExpertId expert : expected) residency.pin(expert);
    for (const ExpertId expert : experts) {
        Placement placement{};
        if (!residency.place(expert, placement)) break;
        make_way(placement);
        start_load(expert, -1, Priority::kPrefetch);
        prefetcher->on_issued(expert, placement.evicted);
    }
    for (const ExpertId expert : expected) residency.unpin(expert);
}

void CacheState::make_way(const Placement& placement) {
    if (!is_some(placement.evicted)) return;
    SlotId& slot = slot_table[placement.frame];
    leaves(placement.evicted, slot);
    if (resizing || !transport->copies_out(placement.evicted)) return;
    // The frame takes the slot of a free transit: its fill need not wait for the copy out of the
    // old one. That slot is the transit's from now on, and its next fill will wait. In turn, so
    // that this is as late as can be.
    for (size_t i = 0; i < transit.size(); ++i) {
        Transit& spare = transit[next_spare++ % transit.size()];
        if (spare.free()) return std::swap(slot, spare.slot);
    }
}

void CacheState::leaves(ExpertId expert, SlotId slot) {
    transport->left(expert, slot);
    LayerStats& layer = stats_of(expert);
    ++layer.evictions;
    uint8_t& unused_yet = prefetched_unused[expert];
    if (unused_yet) layer.prefetch_wasted_bytes += static_cast<int64_t>(catalog->expert_bytes());
    unused_yet = 0;
}

void CacheState::passed(ExpertId expert) {
    if (!residency.resident(expert)) transport->left(expert, SlotId::kNone);
}

void CacheState::unpin(ExpertId expert) {
    residency.unpin(expert);
    if (residency.pinned(expert)) return;
    if (!residency.is_open(residency.frame_of(expert))) {  // its frame has been closed
        leaves(expert);
        residency.remove(expert);
    }
    if (waiting_for_room > 0) changed.notify_all();
}

void CacheState::fetch(StepLease::Impl& lease, Member& member, const Placement& placement) {
    make_way(placement);
    const std::shared_ptr<Load> load = start_load(member.expert, -1, Priority::kDemand);
    if (load->state == Load::State::kReading) return join(lease, member);
    --lease.pending;
    member.state = Member::State::kLoading;  // until settle() hears of the failure
    member.load = load;
}

void CacheState::join(StepLease::Impl& lease, Member& member) {
    residency.pin(member.expert);
    --lease.pending;
    member.transit = -1;
    member.slot = slot_of(member.expert);
    if (const std::shared_ptr<Load>& load = loads[member.expert]) {
        member.state = Member::State::kLoading;
        member.load = load;
        ++load->waiting;
        if (load->prefetch && !load->wanted && load->transfer) transport->promote(load->transfer);
        load->wanted = true;
        return;
    }
    member.state = Member::State::kReady;
    uint8_t& unused_yet = prefetched_unused[member.expert];
    if (unused_yet) {
        stats_of(member.expert).prefetch_useful_bytes +=
            static_cast<int64_t>(catalog->expert_bytes());
    }
    unused_yet = 0;
}

void CacheState::start_surplus(StepLease::Impl& lease) {
    for (size_t& i = lease.next_pending; lease.pending > 0; ++i) {
        Member& member = lease.members[i];
        if (member.state != Member::State::kPending) continue;
        if (residency.resident(member.expert)) {  // another step has brought it since
            join(lease, member);
            continue;
        }
        const auto free = std::find_if(transit.begin(), transit.end(), [&](const Transit& slot) {
            return slot.free() && (stays(slot.slot) || residency.occupied_closed_frames() > 0);
        });
        if (free == transit.end()) return;
        free->owner = &lease;
        --lease.pending;
        member.transit = static_cast<int32_t>(free - transit.begin());
        member.slot = free->slot;
        member.state = Member::State::kLoading;
        member.load = start_load(member.expert, member.transit, Priority::kDemand);
    }
}

void CacheState::settle(StepLease::Impl& lease) {
    for (Member& member : lease.members) {
        if (member.state != Member::State::kLoading) continue;
        switch (member.load->state) {
            case Load::State::kReading:
                continue;
            case Load::State::kComplete:
                member.state = Member::State::kReady;
                break;
            case Load::State::kFailed:
                member.state = Member::State::kFailed;
                if (lease.failure.empty()) lease.failure = member.load->error;
                break;
        }
        member.load.reset();
    }
}

void CacheState::let_go(Member& member) {
    const bool has_slot = member.state == Member::State::kLoading ||
                          member.state == Member::State::kReady ||
                          member.state == Member::State::kHeld;
    if (has_slot && member.transit >= 0) {
        Transit& slot = transit[static_cast<size_t>(member.transit)];
        slot.owner = nullptr;
        if (slot.load == nullptr) passed(member.expert);
        changed.notify_all();
    } else if (has_slot) {
        if (member.load) --member.load->waiting;
        unpin(member.expert);
    }
    member.load.reset();
}

void CacheState::hand_out(StepLease::Impl& lease, std::vector<ReadyExpert>& out) {
    for (size_t i = 0; i < lease.members.size(); ++i) {
        Member& member = lease.members[i];
        if (member.state != Member::State::kReady) continue;
        out.push_back({static_cast<int32_t>(i), member.slot});
        member.state = Member::State::kHeld;
        --lease.to_hand_out;
    }
}

void CacheState::end_lease(StepLease::Impl& lease) {
    if (lease.released) return;
    settle(lease);
    for (Member& member : lease.members) {
        let_go(member);
        member.state = Member::State::kDone;
    }
    lease.released = true;
    active.back()->active_index = lease.active_index;
    active[lease.active_index] = active.back();
    active.pop_back();
    if (waiting_for_room > 0) changed.notify_all();
}

bool CacheState::transit_never_frees() const {
    const auto me = std::this_thread::get_id();
    return std::all_of(transit.begin(), transit.end(), [&](const Transit& slot) {
        if (slot.owner == nullptr) return false;
        if (slot.owner->thread == me) return true;
        return std::any_of(active.begin(), active.end(), [&](const StepLease::Impl* lease) {
            return lease->waiting_for_transit > 0 && lease->thread == slot.owner->thread;
        });
    });
}

int32_t CacheState::slots_held_by_this_thread(const StepLease::Impl* besides, int32_t from) const {
    std::vector<SlotId> slots;
    for (const StepLease::Impl* lease : active) {
        if (lease == besides || lease->thread != std::this_thread::get_id()) continue;
        for (const Member& member : lease->members) {
            const bool pins = member.state == Member::State::kLoading ||
                              member.state == Member::State::kReady ||
                              member.state == Member::State::kHeld;
            if (!pins || (besides != nullptr && member.transit >= 0)) continue;
            const bool counts = member.transit >= 0
                                    ? number(member.slot) >= from + ExpertCache::kTransitSlots
                                    : number(residency.frame_of(member.expert)) >= from;
            const bool shared =
                besides != nullptr &&
                std::any_of(besides->members.begin(), besides->members.end(),
                            [&](const Member& m) { return m.expert == member.expert; });
            if (counts && !shared) slots.push_back(member.slot);
        }
    }
    std::sort(slots.begin(), slots.end());
    return static_cast<int32_t>(std::unique(slots.begin(), slots.end()) - slots.begin());
}

void CacheState::gather_slots(int32_t frames) {
    const SlotId end{frames + ExpertCache::kTransitSlots};
    auto other = IdRange<FrameId>(frames, static_cast<int32_t>(slot_table.size())).begin();
    for (const FrameId frame : all_ids<FrameId>(frames)) {
        if (slot_table[frame] < end) continue;
        while (slot_table[*other] >= end) ++other;
        residency.exchange(frame, *other);
        std::swap(slot_table[frame], slot_table[*other]);
    }
}

bool CacheState::transit_has_slots_that_stay() {
    bool all = true;
    for (Transit& slot : transit) {
        if (stays(slot.slot)) continue;
        if (!slot.free()) {
            all = false;
            continue;
        }
        // Closed frames, empty now, have as many slots that stay as transits have that go.
        std::swap(slot.slot,
                  *std::find_if(slot_table.begin() + residency.frames(), slot_table.end(),
                                [&](SlotId one) { return stays(one); }));
        changed.notify_all();
    }
    // The slots that go, by closed frame: in the order in which their memory will come back.
    if (all) {
        number_from(slot_table.begin() + residency.frames(), slot_table.end(),
                    residency.frames() + ExpertCache::kTransitSlots);
    }
    return all;
}

}  // namespace moeinf
