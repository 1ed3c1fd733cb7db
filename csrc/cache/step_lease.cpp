// A step from its holder's side: it waits for experts, gets them, and releases them.
#include <algorithm>
#include <chrono>

#include "base/error.h"
#include "base/ranges.h"
#include "cache/cache_state.h"

namespace moeinf {
namespace {

using Clock = std::chrono::steady_clock;

// Adds the time since the first wait of a call to a layer's stall. Goes after the lock it needs.
class Stall {
public:
    explicit Stall(double& seconds) : seconds_(seconds) {}
    Stall(const Stall&) = delete;
    Stall& operator=(const Stall&) = delete;
    ~Stall() { end(); }
    void start() {
        if (!waited_) since_ = Clock::now();
        waited_ = true;
    }
    void end() {
        if (waited_) seconds_ += std::chrono::duration<double>(Clock::now() - since_).count();
        waited_ = false;
    }

private:
    double& seconds_;
    bool waited_ = false;
    Clock::time_point since_;
};

bool loading(const StepLease::Impl& lease) {
    return std::any_of(lease.members.begin(), lease.members.end(),
                       [](const Member& m) { return m.state == Member::State::kLoading; });
}

void check_alive(const StepLease::Impl& lease) {
    if (lease.released) throw Error(ErrorCode::kInvalid, "this step has been released");
    if (!lease.failure.empty()) throw Error(ErrorCode::kRead, lease.failure);
}

std::string name_of(ModelShape shape, ExpertId expert) {
    return "expert " + std::to_string(number(shape.index_of(expert))) + " of layer " +
           std::to_string(number(shape.layer_of(expert)));
}

// Counts a thread in while it waits. Goes after the lock.
class StagingWait {
public:
    explicit StagingWait(int32_t& count) : count_(count) { ++count_; }
    StagingWait(const StagingWait&) = delete;
    StagingWait& operator=(const StagingWait&) = delete;
    ~StagingWait() { --count_; }

private:
    int32_t& count_;
};

}  // namespace

// All or nothing, so that two steps that wait for slots never hold what the other needs.
void CacheState::acquire_all(StepLease::Impl& lease, std::unique_lock<std::mutex>& lock) {
    for (Member& member : lease.members) {
        release_member(member);
        member.staging = -1;
        member.state = Member::State::kPending;
    }
    lease.pending = lease.members.size();
    lease.next_pending = 0;
    const auto count = static_cast<int32_t>(lease.members.size());
    Residency& residency = tier.residency();
    const Tier::RoomWatch watch(tier);
    for (;;) {
        const int32_t held = slots_held_by_this_thread(&lease, 0);
        if (count + held > residency.frames()) {
            throw Error(
                ErrorCode::kCapacity,
                "a step of " + std::to_string(count) + " experts at once does not fit into " +
                    std::to_string(residency.frames()) + " slots" +
                    (held == 0
                         ? ""
                         : ", of which this thread's other leases hold " + std::to_string(held)));
        }
        int32_t missing = 0;
        int32_t evictable_members = 0;
        for (const Member& member : lease.members) {
            if (!residency.resident(member.expert)) {
                ++missing;
            } else if (!residency.pinned(member.expert)) {
                ++evictable_members;
            }
        }
        if (missing <= residency.room() - evictable_members) break;
        wait(lock);
        check_alive(lease);
    }
    flat_ids.clear();
    for (const Member& member : lease.members) flat_ids.push_back(member.expert);
    residency.insert(flat_ids, plan);
    auto placement = plan.placements.begin();
    for (Member& member : lease.members) {
        if (placement != plan.placements.end() && placement->expert == member.expert) {
            fetch(lease, member, *placement++);
        } else {
            join(lease, member);
        }
    }
}

StepLease::StepLease(std::shared_ptr<CacheState> cache) : cache_(std::move(cache)) {}

StepLease::StepLease(StepLease&&) noexcept = default;

StepLease::~StepLease() {
    if (impl_ == nullptr || cache_->forked()) return;
    const std::lock_guard lock(cache_->tier.mutex);
    cache_->end_lease(*impl_);
    cache_->unused.push_back(std::move(impl_));
}

void StepLease::release() noexcept {
    if (cache_->forked()) return;
    const std::lock_guard lock(cache_->tier.mutex);
    cache_->end_lease(*impl_);
    cache_->tier.changed.notify_all();
}

bool StepLease::wait_ready(std::vector<ReadyExpert>& out) {
    const Range range("moeinf wait");
    CacheState& cache = *cache_;
    Impl& lease = *impl_;
    cache.check_process();
    std::unique_lock lock(cache.tier.mutex);
    lease.thread = std::this_thread::get_id();
    Stall stall(cache.stats[lease.layer].stall_seconds);
    for (;;) {
        cache.collect_fills(lease);
        check_alive(lease);
        if (lease.to_hand_out == 0) return false;
        cache.start_surplus(lease);
        if (cache.hand_out(lease, out)) {
            stall.end();
            lock.unlock();
            cache.flush();
            return true;
        }
        stall.start();
        if (loading(lease)) {
            cache.wait(lock);
            continue;
        }
        const StagingWait waiting(lease.waiting_for_staging);
        if (cache.staging_never_frees()) {
            throw Error(ErrorCode::kCapacity,
                        name_of(cache.catalog().shape(), lease.members[lease.next_pending].expert) +
                            " has to pass through a staging slot, and all " +
                            std::to_string(ExpertCache::kStagingSlots) +
                            " are held by steps whose threads wait: release experts before "
                            "waiting for more");
        }
        cache.wait(lock);
    }
}

void StepLease::take_ready(std::vector<ReadyExpert>& out) {
    CacheState& cache = *cache_;
    cache.check_process();
    std::unique_lock lock(cache.tier.mutex);
    impl_->thread = std::this_thread::get_id();
    cache.collect_fills(*impl_);
    check_alive(*impl_);
    cache.start_surplus(*impl_);
    (void)cache.hand_out(*impl_, out);
    lock.unlock();
    cache.flush();
}

void StepLease::release(int32_t position) {
    CacheState& cache = *cache_;
    Impl& lease = *impl_;
    cache.check_process();
    std::unique_lock lock(cache.tier.mutex);
    if (lease.released) throw Error(ErrorCode::kInvalid, "this step has been released");
    if (position < 0 || static_cast<size_t>(position) >= lease.members.size() ||
        lease.members[static_cast<size_t>(position)].state != Member::State::kHeld) {
        throw Error(ErrorCode::kInvalid, "position " + std::to_string(position) + " of a step of " +
                                             std::to_string(lease.members.size()) +
                                             " experts is not handed out");
    }
    Member& member = lease.members[static_cast<size_t>(position)];
    cache.release_member(member);
    member.state = Member::State::kDone;
    if (lease.failure.empty()) {
        if (lease.passes_on && member.staging < 0) cache.pass_on(lease, member.expert);
        if (lease.passes_on || member.staging >= 0) cache.start_surplus(lease, true);
    }
    lock.unlock();
    cache.flush();
}

void StepLease::acquire_all(std::vector<ReadyExpert>& out) {
    const Range range("moeinf wait");
    CacheState& cache = *cache_;
    Impl& lease = *impl_;
    cache.check_process();
    std::unique_lock lock(cache.tier.mutex);
    lease.thread = std::this_thread::get_id();
    Stall stall(cache.stats[lease.layer].stall_seconds);
    cache.collect_fills(lease);
    check_alive(lease);
    if (lease.to_hand_out != lease.members.size()) {
        throw Error(ErrorCode::kInvalid, "acquire_all() after wait_ready() has handed out experts");
    }
    const bool surplus = std::any_of(
        lease.members.begin(), lease.members.end(),
        [](const Member& m) { return m.state == Member::State::kPending || m.staging >= 0; });
    if (surplus) {
        stall.start();
        cache.acquire_all(lease, lock);
    }
    for (;;) {
        cache.collect_fills(lease);
        check_alive(lease);
        if (!loading(lease)) break;
        stall.start();
        cache.wait(lock);
    }
    cache.hand_out(lease, out);
}

}  // namespace moeinf
