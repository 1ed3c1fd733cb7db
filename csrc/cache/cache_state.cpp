// Fills, members and staging slots: what changes when bytes arrive or holders release them.
#include "cache/cache_state.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "tier/device_link.h"
#include "tier/file_source.h"
#include "tier/shared_source.h"

namespace moeinf {
namespace {

std::shared_ptr<SharedSegment> make_segment(const Catalog& catalog,
                                            const ExpertCacheOptions& options) {
    if (options.shared.empty()) return nullptr;
    if (options.device != nullptr) {
        throw Error(ErrorCode::kInvalid, "shared: expected slots in RAM, found a device");
    }
    if (options.slots != catalog.total_experts()) {
        throw Error(ErrorCode::kInvalid, "shared: expected a slot for each of " +
                                             std::to_string(catalog.total_experts()) +
                                             " experts, found " + std::to_string(options.slots));
    }
    return std::make_shared<SharedSegment>(options.shared, catalog, ExpertCache::kStagingSlots);
}

std::shared_ptr<SlotPool> make_pool(const Catalog& catalog, int32_t slots, Device* device,
                                    const SharedSegment* segment) {
    const int32_t total = catalog.total_experts();
    if (slots < 1 || slots > total) {
        throw Error(ErrorCode::kInvalid, "a cache for " + std::to_string(total) +
                                             " experts needs 1 to " + std::to_string(total) +
                                             " slots, not " + std::to_string(slots));
    }
    const int32_t capacity = total + ExpertCache::kStagingSlots;
    const uint64_t slot_bytes = catalog.slot_bytes();
    const uint64_t nbytes = static_cast<uint64_t>(capacity) * slot_bytes;
    if (segment != nullptr) {
        return std::make_shared<SlotPool>(segment->arena(), slot_bytes, capacity, capacity);
    }
    return std::make_shared<SlotPool>(device ? device->make_arena(nbytes) : make_host_arena(nbytes),
                                      slot_bytes, capacity, slots + ExpertCache::kStagingSlots);
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

// The options' own, or one for this cache alone.
std::shared_ptr<HostTier> host_tier_of(const std::shared_ptr<const Catalog>& catalog,
                                       const ExpertCacheOptions& options) {
    if (options.host_tier != nullptr) {
        options.host_tier->check_serves(*catalog);
        return options.host_tier;
    }
    return HostTier::make(
        catalog, *options.device,
        {options.host_slots, options.policy, options.exclusive, options.copy, options.eamc});
}

}  // namespace

CacheState::CacheState(std::shared_ptr<const Catalog> catalog, ExpertCacheOptions options)
    : poll(std::move(options.poll)),
      stats(checked(catalog).num_layers()),
      prefetched_unused(catalog->total_experts()),
      seen(catalog->total_experts()),
      segment(make_segment(*catalog, options)),
      tier(catalog, make_pool(*catalog, options.slots, options.device.get(), segment.get()),
           make_policy(options.policy, catalog->shape(), checked_eamc(options, catalog->shape())),
           options.slots, ExpertCache::kStagingSlots, *this, segment != nullptr) {
    if (options.host_tier != nullptr && options.device == nullptr) {
        throw Error(ErrorCode::kInvalid, "a RAM tier is for a cache whose slots lie on a device");
    }
    int64_t delay_bytes = 0;
    if (options.device) {
        auto source = std::make_unique<DeviceLink>(
            tier, options.device, host_tier_of(catalog, options), options.gather_below,
            options.prefetch == "off" ? DeviceLink::Arrived()
                                      : [this](auto... which) { on_arrival(which...); });
        link = source.get();
        files = &source->host().files();
        delay_bytes = static_cast<int64_t>(DeviceLink::kWindowBytes);
        tier.connect(std::move(source));
    } else {
        auto source = segment == nullptr
                          ? std::make_unique<FileSource>(tier, options.copy)
                          : std::make_unique<SharedSource>(tier, options.copy, segment);
        files = &source->files();
        delay_bytes = source->delay_bytes();
        tier.connect(std::move(source));
    }
    for (const ExpertId expert : catalog->shape().experts()) {
        Placement placement{};
        if (segment != nullptr && segment->filled(expert)) {
            (void)tier.residency().place(expert, placement);
        }
    }
    const Prefetcher::Costs costs{static_cast<int64_t>(catalog->expert_bytes()), delay_bytes};
    prefetcher = make_prefetcher(options.prefetch, catalog->shape(), costs, options.eamc.get());
}

void CacheState::check_process() const {
    if (forked()) {
        throw Error(ErrorCode::kUnsupported,
                    "a cache does not survive a fork: make a new one in the child process");
    }
}

void CacheState::on_fill_started(const Fill& fill) {
    if (prefetcher == nullptr) return;
    prefetcher->read_started(fill.expert, fill.priority == Priority::kDemand, seconds_now());
}

void CacheState::on_arrival(ExpertId expert, Priority submitted) {
    const std::lock_guard lock(tier.mutex);
    prefetcher->read_ended(expert, submitted == Priority::kDemand, true, seconds_now());
}

void CacheState::on_fill_ended(Fill& fill) {
    const bool complete = fill.state == Fill::State::kComplete;
    const bool prefetched = fill.priority == Priority::kPrefetch;
    if (prefetcher && !(complete && link != nullptr)) {  // else see on_arrival()
        prefetcher->read_ended(fill.expert, !prefetched, complete, seconds_now());
    }
    if (!complete) return;
    LayerStats& layer = stats_of(fill.expert);
    const auto nbytes = fill.moved_nothing ? 0 : static_cast<int64_t>(catalog().expert_bytes());
    (prefetched ? layer.prefetch_bytes : layer.demand_bytes) += nbytes;
    if (prefetched && fill.demanded) layer.prefetch_useful_bytes += nbytes;
    if (fill.staging < 0) prefetched_unused[fill.expert] = prefetched && !fill.demanded;
}

void CacheState::on_evicted(ExpertId expert) {
    LayerStats& layer = stats_of(expert);
    ++layer.evictions;
    uint8_t& unused_yet = prefetched_unused[expert];
    if (unused_yet) layer.prefetch_wasted_bytes += static_cast<int64_t>(catalog().expert_bytes());
    unused_yet = 0;
}

bool CacheState::prefetch(ExpertId expert, ExpertId& evicted) {
    Placement placement{};
    if (!tier.residency().place(expert, placement)) return false;
    tier.evict_for(placement);
    tier.start_fill(expert, Priority::kPrefetch);
    evicted = placement.evicted;
    return true;
}

void CacheState::start_prefetches() {
    const std::span<const ExpertId> experts = prefetcher->choose(tier.residency());
    if (experts.empty()) return;
    const std::span<const ExpertId> expected = prefetcher->expected_residents();
    for (const ExpertId expert : expected) tier.residency().pin(expert);
    for (const ExpertId expert : experts) {
        ExpertId evicted{};
        if (!prefetch(expert, evicted)) break;
        prefetcher->on_issued(expert, evicted);
    }
    for (const ExpertId expert : expected) tier.residency().unpin(expert);
}

void CacheState::fetch(StepLease::Impl& lease, Member& member, const Placement& placement) {
    tier.evict_for(placement);
    tier.start_fill(member.expert, Priority::kDemand);
    join(lease, member);
}

void CacheState::join(StepLease::Impl& lease, Member& member) {
    --lease.pending;
    member.staging = -1;
    member.fill = tier.join(member.expert, true);
    member.slot = tier.slot_of(member.expert);
    if (member.fill) {
        member.state = Member::State::kLoading;
        return;
    }
    member.state = Member::State::kReady;
    uint8_t& unused_yet = prefetched_unused[member.expert];
    if (unused_yet) {
        stats_of(member.expert).prefetch_useful_bytes +=
            static_cast<int64_t>(catalog().expert_bytes());
    }
    unused_yet = 0;
}

// There is one.
Member& CacheState::next_pending(StepLease::Impl& lease, bool kept) {
    const auto is_pending = [](const Member& m) { return m.state == Member::State::kPending; };
    const auto begin =
        std::find_if(lease.members.begin() + static_cast<std::ptrdiff_t>(lease.next_pending),
                     lease.members.end(), is_pending);
    lease.next_pending = static_cast<size_t>(begin - lease.members.begin());
    if (!lease.passes_on) return *begin;
    const auto best = std::find_if(begin, lease.members.end(), [&](const Member& m) {
        return is_pending(m) && tier.residency().keeps(m.expert) == kept;
    });
    return best == lease.members.end() ? *begin : *best;
}

// Will a frame of the step be passed on?
bool CacheState::frames_to_come(const StepLease::Impl& lease, bool of_held) const {
    return std::any_of(lease.members.begin(), lease.members.end(), [&](const Member& m) {
        return m.has_slot() && m.staging < 0 && (of_held || m.state != Member::State::kHeld) &&
               !tier.residency().keeps(m.expert);
    });
}

void CacheState::start_surplus(StepLease::Impl& lease, bool of_held) {
    while (lease.pending > 0) {
        Member& member = next_pending(lease, false);
        if (lease.passes_on && tier.residency().keeps(member.expert) &&
            frames_to_come(lease, of_held)) {
            return;
        }
        if (tier.residency().resident(member.expert)) {  // another step has brought it since
            join(lease, member);
            continue;
        }
        const std::optional<int32_t> staging = tier.claim_staging();
        if (!staging) return;
        staging_users[static_cast<size_t>(*staging)] = &lease;
        --lease.pending;
        member.staging = *staging;
        member.fill = tier.start_staged_fill(*staging, member.expert, Priority::kDemand);
        member.slot = member.fill->slot;
        member.state = Member::State::kLoading;
    }
}

void CacheState::collect_fills(StepLease::Impl& lease) {
    for (Member& member : lease.members) {
        if (member.state != Member::State::kLoading) continue;
        switch (member.fill->state) {
            case Fill::State::kUnderWay:
                continue;
            case Fill::State::kComplete:
                member.state = Member::State::kReady;
                break;
            case Fill::State::kFailed:
                member.state = Member::State::kFailed;
                if (lease.failure.empty()) lease.failure = member.fill->error;
                break;
        }
        member.fill.reset();
    }
}

void CacheState::release_member(Member& member) {
    if (member.has_slot()) {
        if (member.staging >= 0) {
            tier.release_staging(member.staging, member.expert);
        } else {
            tier.leave(member.expert, member.fill);
        }
    }
    member.fill.reset();
}

void CacheState::pass_on(StepLease::Impl& lease, ExpertId computed) {
    Residency& residency = tier.residency();
    if (!residency.resident(computed) || residency.pinned(computed) || residency.keeps(computed)) {
        return;
    }
    Placement placement{};
    const auto give = [&](ExpertId expert) {
        if (residency.has_free_frame()) {  // nobody need leave
            (void)residency.place(expert, placement);
        } else {
            residency.replace(computed, expert, placement);
        }
    };
    while (lease.pending > 0) {
        Member& member = next_pending(lease, true);
        if (residency.resident(member.expert)) {  // another step has brought it since
            join(lease, member);
            continue;
        }
        give(member.expert);
        return fetch(lease, member, placement);
    }
    while (lease.next_layer < lease.layer_end) {
        const ExpertId expert = lease.next_layer;
        lease.next_layer = ExpertId{number(expert) + 1};
        if (residency.resident(expert)) continue;
        give(expert);
        tier.evict_for(placement);
        tier.start_fill(expert, Priority::kPrefetch);
        return;
    }
}

bool CacheState::hand_out(StepLease::Impl& lease, std::vector<ReadyExpert>& out) {
    const size_t before = lease.to_hand_out;
    for (size_t i = 0; i < lease.members.size(); ++i) {
        Member& member = lease.members[i];
        if (member.state != Member::State::kReady) continue;
        out.push_back({static_cast<int32_t>(i), member.slot});
        member.state = Member::State::kHeld;
        --lease.to_hand_out;
    }
    return lease.to_hand_out < before;
}

void CacheState::end_lease(StepLease::Impl& lease) {
    if (lease.released) return;
    collect_fills(lease);
    for (Member& member : lease.members) {
        release_member(member);
        member.state = Member::State::kDone;
    }
    lease.released = true;
    active.back()->active_index = lease.active_index;
    active[lease.active_index] = active.back();
    active.pop_back();
    tier.announce_room();
}

bool CacheState::staging_never_frees() const {
    const auto me = std::this_thread::get_id();
    for (int32_t i = 0; i < tier.staging_slots(); ++i) {
        if (!tier.is_claimed(i)) return false;
        const std::thread::id user = staging_users[static_cast<size_t>(i)]->thread;
        const bool waits = std::any_of(active.begin(), active.end(), [&](const auto* lease) {
            return lease->waiting_for_staging > 0 && lease->thread == user;
        });
        if (user != me && !waits) return false;
    }
    return true;
}

int32_t CacheState::slots_held_by_this_thread(const StepLease::Impl* besides, int32_t from) const {
    std::vector<SlotId> slots;
    for (const StepLease::Impl* lease : active) {
        if (lease == besides || lease->thread != std::this_thread::get_id()) continue;
        for (const Member& member : lease->members) {
            if (!member.has_slot() || (besides != nullptr && member.staging >= 0)) continue;
            const bool counts = member.staging >= 0
                                    ? number(member.slot) >= tier.slots_with(from)
                                    : number(tier.residency().frame_of(member.expert)) >= from;
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

}  // namespace moeinf
