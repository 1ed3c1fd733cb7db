// Reads, pins and transit slots: what changes when bytes arrive or holders let go.
#include "cache/cache_state.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "tier/file_transport.h"

namespace moeinf {
namespace {

constexpr std::chrono::milliseconds kPollEvery{50};

PolicyShape shape_of(const Catalog& catalog) {
    return {catalog.num_layers(), catalog.num_experts()};
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

const Eamc* checked_eamc(const ExpertCacheOptions& options, PolicyShape shape) {
    if (options.eamc == nullptr) return nullptr;
    if (options.policy != "eam" && options.prefetch != "eam") {
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
      residency(shape_of(*catalog), options.slots,
                make_policy(options.policy, shape_of(*catalog),
                            checked_eamc(options, shape_of(*catalog)))),
      stats(static_cast<size_t>(catalog->num_layers())),
      loads(static_cast<size_t>(catalog->total_experts())),
      prefetched_unused(loads.size(), 0),
      row_of_slot(loads.size()),
      seen(loads.size()) {
    for (size_t i = 0; i < transit.size(); ++i) transit[i].row = static_cast<int32_t>(i);
    std::iota(row_of_slot.begin(), row_of_slot.end(), ExpertCache::kTransitSlots);
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
    prefetcher = make_prefetcher(options.prefetch, shape_of(*catalog), costs, options.eamc.get());
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

std::shared_ptr<Load> CacheState::start_load(int32_t expert, int32_t transit_slot,
                                             Priority priority) {
    auto load = std::make_shared<Load>();
    load->expert = expert;
    load->transit = transit_slot;
    load->prefetch = priority == Priority::kPrefetch;
    int32_t row = -1;
    if (prefetcher) prefetcher->read_started(expert, !load->prefetch, seconds_now());
    if (transit_slot >= 0) {
        row = transit[static_cast<size_t>(transit_slot)].row;
        transit[static_cast<size_t>(transit_slot)].load = load;
    } else {
        row = row_of(residency.slot_of(expert));
        residency.pin(expert);
        load_of(expert) = load;
    }
    try {
        // The callback cannot overtake this assignment: it needs the lock we hold. The load lives
        // until then: its slot's owner, above, holds it. A small callback needs no memory.
        load->transfer = transport->submit(expert, row, priority,
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

void CacheState::on_arrival(int32_t expert, Priority submitted) {
    const std::lock_guard lock(mutex);
    prefetcher->read_ended(expert, submitted == Priority::kDemand, true, seconds_now());
}

void CacheState::end_load(Load& load, Load::State state, std::string error) {
    const std::shared_ptr<Load> keep = std::move(
        load.transit >= 0 ? transit[static_cast<size_t>(load.transit)].load : load_of(load.expert));
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
        prefetched_unused[static_cast<size_t>(load.expert)] = load.prefetch && !load.wanted;
        unpin(load.expert);
    } else {
        // Those who wait for it learn of the failure from the load; their pins end here.
        for (uint32_t pins = load.waiting + 1; pins > 0; --pins) residency.unpin(load.expert);
        residency.remove(load.expert);
    }
    changed.notify_all();
}

void CacheState::start_prefetches() {
    const std::span<const int32_t> experts = prefetcher->choose(residency);
    if (experts.empty()) return;
    const std::span<const int32_t> expected = prefetcher->expected_residents();
    for (const int32_t expert : expected) residency.pin(expert);
    for (const int32_t expert : experts) {
        Placement placement{};
        if (!residency.place(expert, placement)) break;
        make_way(placement);
        start_load(expert, -1, Priority::kPrefetch);
        prefetcher->fetched(expert, placement.evicted);
    }
    for (const int32_t expert : expected) residency.unpin(expert);
}

void CacheState::make_way(const Placement& placement) {
    if (placement.evicted < 0) return;
    int32_t& row = row_of(placement.slot);
    leaves(placement.evicted, row);
    if (resizing || !transport->copies_out(placement.evicted)) return;
    // The slot takes the row of a transit slot that is free: what fills it need not wait for the
    // copy out of the old one. That row is the transit slot's from now on, and what fills it next
    // will wait. In turn, so that this is as late as can be.
    for (size_t i = 0; i < transit.size(); ++i) {
        Transit& spare = transit[next_spare++ % transit.size()];
        if (spare.free()) return std::swap(row, spare.row);
    }
}

void CacheState::leaves(int32_t expert, int32_t row) {
    transport->left(expert, row);
    LayerStats& layer = stats_of(expert);
    ++layer.evictions;
    uint8_t& unused_yet = prefetched_unused[static_cast<size_t>(expert)];
    if (unused_yet) layer.prefetch_wasted_bytes += static_cast<int64_t>(catalog->expert_bytes());
    unused_yet = 0;
}

void CacheState::passed(int32_t expert) {
    if (residency.slot_of(expert) < 0) transport->left(expert, -1);
}

void CacheState::unpin(int32_t expert) {
    residency.unpin(expert);
    if (residency.pinned(expert)) return;
    if (residency.slot_of(expert) >= residency.slots()) {  // its slot has been closed
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
    member.row = row_of(residency.slot_of(member.expert));
    if (const std::shared_ptr<Load>& load = load_of(member.expert)) {
        member.state = Member::State::kLoading;
        member.load = load;
        ++load->waiting;
        if (load->prefetch && !load->wanted && load->transfer) transport->promote(load->transfer);
        load->wanted = true;
        return;
    }
    member.state = Member::State::kReady;
    uint8_t& unused_yet = prefetched_unused[static_cast<size_t>(member.expert)];
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
        if (residency.slot_of(member.expert) >= 0) {  // another step has brought it since
            join(lease, member);
            continue;
        }
        const auto free = std::find_if(transit.begin(), transit.end(), [&](const Transit& slot) {
            return slot.free() && (stays(slot.row) || residency.occupied_closed_slots() > 0);
        });
        if (free == transit.end()) return;
        free->owner = &lease;
        --lease.pending;
        member.transit = static_cast<int32_t>(free - transit.begin());
        member.row = free->row;
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
        out.push_back({static_cast<int32_t>(i), member.row});
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

int32_t CacheState::slots_held_by_this_thread(const StepLease::Impl* besides,
                                              int32_t from_slot) const {
    std::vector<int32_t> rows;
    for (const StepLease::Impl* lease : active) {
        if (lease == besides || lease->thread != std::this_thread::get_id()) continue;
        for (const Member& member : lease->members) {
            const bool pins = member.state == Member::State::kLoading ||
                              member.state == Member::State::kReady ||
                              member.state == Member::State::kHeld;
            if (!pins || (besides != nullptr && member.transit >= 0)) continue;
            const bool counts = member.transit >= 0
                                    ? member.row >= from_slot + ExpertCache::kTransitSlots
                                    : residency.slot_of(member.expert) >= from_slot;
            const bool shared =
                besides != nullptr &&
                std::any_of(besides->members.begin(), besides->members.end(),
                            [&](const Member& m) { return m.expert == member.expert; });
            if (counts && !shared) rows.push_back(member.row);
        }
    }
    std::sort(rows.begin(), rows.end());
    return static_cast<int32_t>(std::unique(rows.begin(), rows.end()) - rows.begin());
}

void CacheState::gather_rows(int32_t slots) {
    const int32_t rows = slots + ExpertCache::kTransitSlots;
    int32_t other = slots;
    for (int32_t slot = 0; slot < slots; ++slot) {
        if (row_of(slot) < rows) continue;
        while (row_of(other) >= rows) ++other;
        residency.exchange(slot, other);
        std::swap(row_of(slot), row_of(other));
    }
}

bool CacheState::transit_has_rows_that_stay() {
    bool all = true;
    for (Transit& slot : transit) {
        if (stays(slot.row)) continue;
        if (!slot.free()) {
            all = false;
            continue;
        }
        // Closed slots, empty now, have as many rows that stay as transit slots have that go.
        std::swap(slot.row,
                  *std::find_if(row_of_slot.begin() + residency.slots(), row_of_slot.end(),
                                [&](int32_t row) { return stays(row); }));
        changed.notify_all();
    }
    // The rows that go, by closed slot: in the order in which their memory will come back.
    if (all) {
        std::iota(row_of_slot.begin() + residency.slots(), row_of_slot.end(),
                  residency.slots() + ExpertCache::kTransitSlots);
    }
    return all;
}

}  // namespace moeinf
