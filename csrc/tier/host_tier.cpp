#include "tier/host_tier.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace moeinf {
namespace {

// As many slots of pinned memory as can be had. It grows in parts, for pinning takes a second for
// some gigabytes, and none of it is done twice.
std::unique_ptr<SlotPool> make_pool(const Catalog& catalog, Device& device, int32_t asked) {
    constexpr int32_t kParts = 16;
    const uint64_t slot_bytes = catalog.slot_bytes();
    const auto nbytes = static_cast<size_t>(asked) * slot_bytes;
    auto pool = std::make_unique<SlotPool>(device.make_pinned_arena(nbytes, slot_bytes), slot_bytes,
                                           asked, HostTier::kMinSlots);
    const int32_t part = std::max(1, asked / kParts);
    try {
        while (pool->slots() < asked) pool->resize(std::min(asked, pool->slots() + part));
    } catch (const Error& error) {
        if (error.code() != ErrorCode::kCapacity) throw;
        // Not all that there is: ids, maps and torch need some too.
        pool->resize(std::max(HostTier::kMinSlots, pool->slots() - part));
    }
    return pool;
}

}  // namespace

HostTier::HostTier(std::shared_ptr<const Catalog> catalog, Device& device, HostTierOptions options,
                   Ready ready)
    : catalog_(std::move(catalog)),
      exclusive_(options.exclusive),
      ready_(std::move(ready)),
      entries_(catalog_->total_experts()) {
    const int32_t asked = std::max(options.slots, kMinSlots);
    pool_ = make_pool(*catalog_, device, asked);
    const int32_t slots = pool_->slots();
    stats_.slots = slots;
    stats_.slots_refused = asked - slots;
    full_house_ = slots >= catalog_->total_experts();
    const ModelShape shape = catalog_->shape();
    residency_ = std::make_unique<Residency>(
        shape, slots, make_policy(options.policy, shape, options.eamc.get()));
    engine_ = std::make_unique<FileReader>(catalog_, options.copy);
}

HostTier::~HostTier() {
    std::deque<Waiter> starved;
    {
        const std::lock_guard lock(mutex_);
        ending_ = true;
        starved.swap(starved_);
    }
    for (const Waiter& one : starved) ready_(one.who, nullptr, "the cache is being closed");
    engine_.reset();
}

std::byte* HostTier::address(ExpertId expert) const {
    return pool_->slot(SlotId{number(residency_->frame_of(expert))});  // its frames stay in place
}

// True once the absent expert has a slot.
bool HostTier::make_room(ExpertId expert) {
    while (exclusive_ && !residency_->has_free_frame() && !duplicates_.empty()) {
        const ExpertId other = duplicates_.front();
        duplicates_.pop_front();
        const bool there = residency_->resident(other) && entries_[other].on_device;
        if (there && !residency_->pinned(other)) residency_->remove(other);
    }
    Placement placement{};
    return residency_->place(expert, placement);
}

void HostTier::note_duplicate(ExpertId expert) {
    if (exclusive_ && entries_[expert].on_device && residency_->resident(expert) &&
        !residency_->pinned(expert)) {
        duplicates_.push_back(expert);
    }
}

std::byte* HostTier::hold(const TransferPtr& who, Priority priority) {
    const std::lock_guard lock(mutex_);
    const ExpertId expert = who->expert();
    Entry& one = entries_[expert];
    const bool present = residency_->resident(expert);
    if (present && one.reading == nullptr) {
        ++stats_.hits;
        residency_->pin(expert);
        return address(expert);
    }
    ++stats_.misses;
    if (present) {
        residency_->pin(expert);
        one.waiting.push_back(who);
        if (priority == Priority::kDemand) engine_->promote(one.reading);
    } else if (make_room(expert)) {
        residency_->pin(expert);
        one.waiting.push_back(who);
        start_read(expert, priority);
    } else {
        // Demands wait before prefetches, each in their order.
        const auto before = std::find_if(starved_.begin(), starved_.end(),
                                         [&](const Waiter& w) { return w.priority > priority; });
        starved_.insert(before, {who, priority});
    }
    return nullptr;
}

void HostTier::start_read(ExpertId expert, Priority priority) {
    // The callback cannot overtake this assignment: it needs the lock we hold.
    entries_[expert].reading = engine_->submit(
        expert, address(expert), priority,
        [this, expert](const TransferPtr& transfer) { on_read(expert, *transfer); });
}

void HostTier::on_read(ExpertId expert, const Transfer& transfer) {
    std::vector<TransferPtr> waiting;
    std::byte* bytes = nullptr;
    std::string error;
    {
        const std::lock_guard lock(mutex_);
        Entry& one = entries_[expert];
        one.reading.reset();
        waiting.swap(one.waiting);
        if (transfer.state() == TransferState::kDone) {
            bytes = address(expert);
            stats_.read_bytes += static_cast<int64_t>(catalog_->expert_bytes());
        } else {
            error = transfer.state() == TransferState::kFailed ? transfer.error()
                                                               : "the read was cancelled";
            for (size_t i = 0; i < waiting.size(); ++i) residency_->unpin(expert);
            residency_->remove(expert);
        }
    }
    for (const TransferPtr& who : waiting) ready_(who, bytes, error);
    if (bytes == nullptr) serve_starved();
}

// Whatever was refused for want of a slot and can have one now.
void HostTier::serve_starved() {
    std::vector<std::pair<TransferPtr, std::byte*>> served;
    {
        const std::lock_guard lock(mutex_);
        while (!starved_.empty() && !ending_) {
            Waiter& one = starved_.front();
            const ExpertId expert = one.who->expert();
            const bool present = residency_->resident(expert);
            if (!present && !make_room(expert)) break;
            residency_->pin(expert);
            Entry& target = entries_[expert];
            if (present && target.reading == nullptr) {
                served.emplace_back(std::move(one.who), address(expert));
            } else {
                target.waiting.push_back(std::move(one.who));
                if (!present) start_read(expert, one.priority);
            }
            starved_.pop_front();
        }
    }
    for (const auto& [who, bytes] : served) ready_(who, bytes, {});
}

void HostTier::promote(ExpertId expert) {
    const std::lock_guard lock(mutex_);
    if (entries_[expert].reading) return engine_->promote(entries_[expert].reading);
    const auto waiter = std::find_if(starved_.begin(), starved_.end(), [&](const Waiter& one) {
        return one.who->expert() == expert;
    });
    if (waiter == starved_.end() || waiter->priority == Priority::kDemand) return;
    Waiter one = std::move(*waiter);
    one.priority = Priority::kDemand;
    starved_.erase(waiter);
    const auto before = std::find_if(starved_.begin(), starved_.end(), [](const Waiter& w) {
        return w.priority == Priority::kPrefetch;
    });
    starved_.insert(before, std::move(one));
}

void HostTier::release(ExpertId expert) {
    {
        const std::lock_guard lock(mutex_);
        residency_->unpin(expert);
        note_duplicate(expert);
        if (starved_.empty()) return;
    }
    serve_starved();
}

std::byte* HostTier::take_over(ExpertId expert) {
    const std::lock_guard lock(mutex_);
    if (!exclusive_ || residency_->resident(expert) || !starved_.empty() || !make_room(expert)) {
        return nullptr;
    }
    residency_->pin(expert);
    ++stats_.demoted;
    return address(expert);
}

bool HostTier::wants(ExpertId expert) const {
    if (!exclusive_) return false;
    const std::lock_guard lock(mutex_);
    return !residency_->resident(expert);
}

void HostTier::drop(ExpertId expert) {
    {
        const std::lock_guard lock(mutex_);
        residency_->unpin(expert);
        if (!residency_->pinned(expert)) residency_->remove(expert);
    }
    serve_starved();
}

void HostTier::set_on_device(ExpertId expert, bool there) {
    const std::lock_guard lock(mutex_);
    entries_[expert].on_device = there;
    note_duplicate(expert);
}

void HostTier::observe(const Step& step) {
    if (full_house_) return;
    const std::lock_guard lock(mutex_);
    residency_->policy().observe(step);
}

HostTierStats HostTier::stats() const {
    const std::lock_guard lock(mutex_);
    return stats_;
}

void HostTier::reset_stats() {
    const std::lock_guard lock(mutex_);
    stats_ = {.slots = stats_.slots, .slots_refused = stats_.slots_refused};
}

}  // namespace moeinf
