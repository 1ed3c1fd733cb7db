#include "tier/host_tier.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace moeinf {
namespace {

// As many slots of pinned memory as the system allows. The memory grows in parts, because pinning
// takes about a second for a few gigabytes and no part should be pinned twice.
std::shared_ptr<SlotPool> make_pool(const Catalog& catalog, Device& device, int32_t wanted) {
    constexpr int32_t kParts = 16;
    const uint64_t slot_bytes = catalog.slot_bytes();
    const auto nbytes = static_cast<size_t>(wanted) * slot_bytes;
    auto pool = std::make_shared<SlotPool>(device.make_pinned_arena(nbytes, slot_bytes), slot_bytes,
                                           wanted, HostTier::kMinSlots);
    const int32_t part = std::max(1, wanted / kParts);
    try {
        while (pool->slots() < wanted) pool->resize(std::min(wanted, pool->slots() + part));
    } catch (const Error& error) {
        if (error.code() != ErrorCode::kCapacity) throw;
        // Leaves a part of the pinnable memory to ids, maps and torch.
        pool->resize(std::max(HostTier::kMinSlots, pool->slots() - part));
    }
    return pool;
}

std::string words_of(const Catalog& catalog) {
    return std::to_string(catalog.num_layers()) + " layers of " +
           std::to_string(catalog.num_experts()) + " experts in " +
           (catalog.files().empty() ? "no file" : catalog.files().front().path);
}

// A forked child leaves the tier unchanged: its threads do not exist there, and a lock may be held.
struct Dispose {
    ForkDetector process;
    void operator()(HostTier* tier) const {
        if (!process.forked()) std::default_delete<HostTier>()(tier);
    }
};

}  // namespace

std::shared_ptr<HostTier> HostTier::make(std::shared_ptr<const Catalog> catalog, Device& device,
                                         HostTierOptions options) {
    if (catalog == nullptr) throw Error(ErrorCode::kInvalid, "a RAM tier needs a catalog");
    std::unique_ptr<HostTier> tier(new HostTier(std::move(catalog), device, std::move(options)));
    return {tier.release(), Dispose()};
}

HostTier::HostTier(std::shared_ptr<const Catalog> catalog, Device& device, HostTierOptions options)
    : exclusive_(options.exclusive), holders_(catalog->total_experts()) {
    const int32_t wanted = std::max(options.slots, kMinSlots);
    auto pool = make_pool(*catalog, device, wanted);
    stats_.slots = pool->slots();
    stats_.slots_refused = wanted - pool->slots();
    holds_all_ = pool->slots() >= catalog->total_experts();
    auto policy = make_policy(options.policy, catalog->shape(), options.eamc.get());
    tier_ = std::make_unique<Tier>(std::move(catalog), std::move(pool), std::move(policy),
                                   stats_.slots, 0, static_cast<Tier::Owner&>(*this));
    auto files = std::make_unique<FileSource>(*tier_, options.read);
    files_ = files.get();
    tier_->connect(std::move(files));
}

HostTier::~HostTier() = default;

void HostTier::check_serves(const Catalog& catalog) const {
    if (process_.forked()) {
        throw Error(ErrorCode::kUnsupported,
                    "a RAM tier does not survive a fork: make a new one in the child process");
    }
    if (&catalog != tier_->catalog().get() && !(catalog == *tier_->catalog())) {
        throw Error(ErrorCode::kInvalid,
                    "the RAM tier and the cache have different stores: expected " +
                        words_of(*tier_->catalog()) + ", found " + words_of(catalog));
    }
}

std::vector<HostTier::Demotion>::iterator HostTier::demotion_of(ExpertId expert) {
    return std::find_if(demotions_.begin(), demotions_.end(),
                        [&](const Demotion& demotion) { return demotion.expert == expert; });
}

PinnedExpert HostTier::locate(ExpertId expert) {
    const auto demotion = demotion_of(expert);
    if (demotion == demotions_.end()) return {tier_->address(expert), nullptr, 0};
    return {tier_->address(expert), demotion->timeline, demotion->point};
}

// True once the absent expert has a slot.
bool HostTier::make_room(ExpertId expert) {
    Residency& residency = tier_->residency();
    while (exclusive_ && !residency.has_free_frame() && !duplicates_.empty()) {
        const ExpertId other = duplicates_.front();
        duplicates_.pop_front();
        const bool twice = residency.resident(other) && holders_[other] > 0;
        if (twice && !residency.pinned(other)) residency.remove(other);
    }
    Placement placement{};
    return residency.place(expert, placement);
}

void HostTier::note_duplicate(ExpertId expert) {
    const Residency& residency = tier_->residency();
    if (exclusive_ && holders_[expert] > 0 && residency.resident(expert) &&
        !residency.pinned(expert)) {
        duplicates_.push_back(expert);
    }
}

std::optional<PinnedExpert> HostTier::pin(FillWaiterPtr waiter, Priority priority) {
    const std::lock_guard lock(tier_->mutex);
    const ExpertId expert = waiter->expert;
    if (tier_->is_ready(expert)) {
        ++stats_.hits;
        (void)tier_->join(expert, false);
        return locate(expert);
    }
    ++stats_.misses;
    const bool present = tier_->residency().resident(expert);
    if (present || make_room(expert)) {
        wait_for_fill(std::move(waiter), priority);
    } else {
        add_starving(std::move(waiter), priority);
    }
    return std::nullopt;
}

void HostTier::wait_for_fill(FillWaiterPtr waiter, Priority priority) {
    const ExpertId expert = waiter->expert;
    if (tier_->fill_of(expert) == nullptr) tier_->start_fill(expert, priority);
    const FillPtr fill = tier_->join(expert, priority == Priority::kDemand);
    fill->waiters.push_back(std::move(waiter));
}

// Demands stand before prefetches, each in the order of arrival.
void HostTier::add_starving(FillWaiterPtr waiter, Priority priority) {
    const auto behind = std::find_if(starving_.begin(), starving_.end(),
                                     [&](const Starving& one) { return one.priority > priority; });
    starving_.insert(behind, {std::move(waiter), priority});
}

void HostTier::tell(Told told) {
    told_.push_back(std::move(told));
    has_told_.store(true, std::memory_order_release);
}

void HostTier::on_fill_ended(Fill& fill) {
    if (fill.state == Fill::State::kComplete && !fill.from_above) {
        stats_.read_bytes += static_cast<int64_t>(tier_->catalog()->expert_bytes());
    }
    for (FillWaiterPtr& waiter : fill.waiters) {
        PinnedExpert pinned;
        if (fill.state == Fill::State::kComplete) pinned = locate(fill.expert);
        tell({std::move(waiter), std::move(pinned), fill.error});
    }
    fill.waiters.clear();
}

void HostTier::after_fill() noexcept {
    {
        const std::lock_guard lock(tier_->mutex);
        serve_starving();  // a failed fill has freed its slot
    }
    flush();
}

// Gives slots to the waiters that had none.
void HostTier::serve_starving() {
    while (!starving_.empty()) {
        Starving& next = starving_.front();
        const ExpertId expert = next.waiter->expert;
        if (tier_->is_ready(expert)) {
            (void)tier_->join(expert, false);
            tell({std::move(next.waiter), locate(expert), {}});
        } else if (tier_->residency().resident(expert) || make_room(expert)) {
            wait_for_fill(std::move(next.waiter), next.priority);
        } else {
            return;
        }
        starving_.pop_front();
    }
}

void HostTier::promote(const FillWaiter& waiter) {
    const std::lock_guard lock(tier_->mutex);
    if (const FillPtr& fill = tier_->fill_of(waiter.expert)) return tier_->promote(fill);
    const auto found = std::find_if(starving_.begin(), starving_.end(), [&](const Starving& one) {
        return one.waiter.get() == &waiter;
    });
    if (found == starving_.end() || found->priority == Priority::kDemand) return;
    FillWaiterPtr promoted = std::move(found->waiter);
    starving_.erase(found);
    add_starving(std::move(promoted), Priority::kDemand);
}

void HostTier::drop_pin(ExpertId expert) {
    tier_->unpin(expert);
    if (tier_->residency().pinned(expert)) return;
    const auto demotion = demotion_of(expert);
    if (demotion != demotions_.end()) {  // a lost demotion; a running one would have a pin
        tier_->residency().remove(expert);
        demotions_.erase(demotion);
    }
    note_duplicate(expert);
}

void HostTier::unpin(ExpertId expert) {
    const std::lock_guard lock(tier_->mutex);
    drop_pin(expert);
    serve_starving();
}

std::vector<FillWaiterPtr> HostTier::withdraw(const void* owner) {
    const std::lock_guard lock(tier_->mutex);
    std::vector<FillWaiterPtr> withdrawn;
    const auto take = [&](const FillWaiterPtr& waiter) {
        if (waiter->owner != owner) return false;
        withdrawn.push_back(waiter);
        return true;
    };
    std::erase_if(starving_, [&](const Starving& one) { return take(one.waiter); });
    std::erase_if(told_, [&](const Told& one) {
        const ExpertId expert = one.waiter->expert;
        if (!take(one.waiter)) return false;
        if (one.error.empty()) drop_pin(expert);
        return true;
    });
    for (const ExpertId expert : tier_->catalog()->shape().experts()) {
        const FillPtr fill = tier_->fill_of(expert);
        if (fill == nullptr) continue;
        const size_t left = std::erase_if(fill->waiters, take);
        for (size_t i = 0; i < left; ++i) tier_->leave(expert, fill);
    }
    serve_starving();
    return withdrawn;
}

void HostTier::add_holder(ExpertId expert) {
    const std::lock_guard lock(tier_->mutex);
    ++holders_[expert];
    note_duplicate(expert);
}

void HostTier::remove_holder(ExpertId expert) {
    const std::lock_guard lock(tier_->mutex);
    --holders_[expert];
}

bool HostTier::accepts_demotion(ExpertId expert) const {
    if (!exclusive_) return false;
    const std::lock_guard lock(tier_->mutex);
    return holders_[expert] <= 1 && !tier_->residency().resident(expert);
}

std::byte* HostTier::accept_demotion(ExpertId expert) {
    const std::lock_guard lock(tier_->mutex);
    if (!exclusive_ || holders_[expert] > 0 || tier_->residency().resident(expert) ||
        !starving_.empty() || !make_room(expert)) {
        return nullptr;
    }
    tier_->start_fill(expert, Priority::kPrefetch, true);
    tier_->residency().pin(expert);  // for the copy
    ++stats_.demoted;
    return tier_->address(expert);
}

void HostTier::demotion_enqueued(ExpertId expert, TimelinePtr timeline, uint64_t point) {
    const std::lock_guard lock(tier_->mutex);
    demotions_.push_back({expert, std::move(timeline), point, false});
    tier_->end(*tier_->fill_of(expert), {});
}

void HostTier::abort_demotion(ExpertId expert) {
    const std::lock_guard lock(tier_->mutex);
    const FillPtr fill = tier_->fill_of(expert);
    tier_->residency().unpin(expert);
    if (fill->waiting > 0) return tier_->fill_from_source(fill);
    tier_->end(*fill, "the copy out of the device failed");
    serve_starving();
}

void HostTier::end_demotion(ExpertId expert, bool arrived) {
    const std::lock_guard lock(tier_->mutex);
    const auto demotion = demotion_of(expert);
    if (arrived) {
        demotions_.erase(demotion);
    } else {
        demotion->lost = true;  // its waiters wait for a point that never comes, and fail
    }
    drop_pin(expert);
    serve_starving();
}

void HostTier::observe(const Step& step) {
    if (holds_all_) return;
    const std::lock_guard lock(tier_->mutex);
    Step counted = step;  // each cache counts its own steps
    counted.index = steps_++;
    tier_->residency().policy().observe(counted);
}

void HostTier::flush() noexcept {
    for (;;) {
        tier_->source().flush();
        if (!has_told_.load(std::memory_order_acquire)) return;
        std::deque<Told> told;
        {
            const std::lock_guard lock(tier_->mutex);
            told.swap(told_);
            has_told_.store(false, std::memory_order_relaxed);
        }
        for (const Told& one : told) one.waiter->on_pinned(one.pinned, one.error);
    }
}

HostTierStats HostTier::stats() const {
    const std::lock_guard lock(tier_->mutex);
    return stats_;
}

void HostTier::reset_stats() {
    const std::lock_guard lock(tier_->mutex);
    stats_ = {.slots = stats_.slots, .slots_refused = stats_.slots_refused};
}

}  // namespace moeinf
