#include "policy/residency.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/error.h"

namespace moeinf {
namespace {

constexpr size_t at(int32_t index) {
    return static_cast<size_t>(index);
}

}  // namespace

Residency::Residency(PolicyShape shape, int32_t slots, std::unique_ptr<Policy> policy)
    : shape_(shape),
      policy_(std::move(policy)),
      slots_(0),
      slot_of_(at(shape.total()), -1),
      pins_(at(shape.total()), 0) {
    if (policy_ == nullptr) throw Error(ErrorCode::kInvalid, "residency needs a policy");
    resize(slots);
}

void Residency::plan(const Step& step, Plan& out) {
    policy_->observe(step);
    insert(step.experts, out);
}

void Residency::insert(std::span<const int32_t> experts, Plan& out) {
    out.hits.clear();
    out.placements.clear();
    out.surplus.clear();
    missing_.clear();
    for (const int32_t expert : experts) {
        (slot_of(expert) >= 0 ? out.hits : missing_).push_back(expert);
    }
    if (missing_.empty()) return;

    const size_t from_free = std::min(missing_.size(), free_slots_.size());
    size_t found = 0;
    if (from_free < missing_.size()) {
        for (const int32_t expert : out.hits) pin(expert);
        victims_.resize(missing_.size() - from_free);
        found = policy_->choose_victims(residents_, pins_, victims_);
        for (const int32_t expert : out.hits) unpin(expert);
    }

    const size_t placed = from_free + found;
    out.placements.resize(placed);
    for (size_t i = 0; i < placed; ++i) {
        int32_t slot;
        int32_t evicted = -1;
        if (i < from_free) {
            slot = free_slots_.back();
            free_slots_.pop_back();
        } else {
            evicted = victims_[i - from_free];
            slot = slot_of(evicted);
        }
        enter(missing_[i], slot, evicted, out.placements[i]);
    }
    out.surplus.assign(missing_.begin() + static_cast<std::ptrdiff_t>(placed), missing_.end());
}

bool Residency::place(int32_t expert, Placement& out) {
    if (!free_slots_.empty()) {
        const int32_t slot = free_slots_.back();
        free_slots_.pop_back();
        enter(expert, slot, -1, out);
        return true;
    }
    int32_t victim = -1;
    if (policy_->choose_victims(residents_, pins_, {&victim, 1}) == 0) return false;
    enter(expert, slot_of(victim), victim, out);
    return true;
}

void Residency::enter(int32_t expert, int32_t slot, int32_t evicted, Placement& out) {
    if (evicted >= 0) {
        // A wrong victim would mean wrong weights later, so it is worth a branch.
        if (slot < 0 || pinned(evicted)) {
            throw Error(ErrorCode::kInvalid, "policy '" + std::string(policy_->name()) +
                                                 "' named expert " + std::to_string(evicted) +
                                                 " as a victim, which is absent or pinned");
        }
        slot_of_[at(evicted)] = -1;
        policy_->evicted(evicted);
    }
    slot_of_[at(expert)] = slot;
    residents_[at(slot)] = expert;
    policy_->inserted(expert);
    out = {expert, slot, evicted};
}

void Residency::remove(int32_t expert) {
    const int32_t slot = slot_of(expert);
    slot_of_[at(expert)] = -1;
    residents_[at(slot)] = -1;
    policy_->evicted(expert);
    if (slot < slots_) {
        free_slots_.push_back(slot);
    } else {
        --occupied_closed_slots_;
        drop_unused_closed_slots();
    }
}

int32_t Residency::room() const noexcept {
    size_t room = free_slots_.size();
    for (size_t slot = 0; slot < at(slots_); ++slot) {
        if (residents_[slot] >= 0 && !pinned(residents_[slot])) ++room;
    }
    return static_cast<int32_t>(room);
}

void Residency::resize(int32_t slots) {
    if (slots < 1) {
        throw Error(ErrorCode::kInvalid,
                    "a cache needs at least 1 slot, not " + std::to_string(slots));
    }
    const int32_t before = slots_;
    slots_ = slots;
    policy_->resized(slots);
    if (slots > before) {
        residents_.resize(std::max(residents_.size(), at(slots)), -1);
        std::vector<int32_t> opened;
        for (int32_t slot = slots - 1; slot >= before; --slot) {
            if (residents_[at(slot)] < 0) {
                opened.push_back(slot);
            } else {
                --occupied_closed_slots_;
            }
        }
        // Low slots are used first, so that a cache touches no more memory than it needs.
        free_slots_.insert(free_slots_.begin(), opened.begin(), opened.end());
    } else {
        std::erase_if(free_slots_, [slots](int32_t slot) { return slot >= slots; });
        for (int32_t slot = slots; slot < before; ++slot) {
            if (residents_[at(slot)] >= 0) ++occupied_closed_slots_;
        }
        // The last to leave takes the closed slots off the end.
        for (size_t slot = at(slots); slot < residents_.size(); ++slot) {
            const int32_t expert = residents_[slot];
            if (expert >= 0 && !pinned(expert)) remove(expert);
        }
    }
    drop_unused_closed_slots();
}

void Residency::exchange(int32_t slot, int32_t other) {
    std::swap(residents_[at(slot)], residents_[at(other)]);
    for (const int32_t one : {slot, other}) {
        if (residents_[at(one)] >= 0) slot_of_[at(residents_[at(one)])] = one;
    }
    for (int32_t& free : free_slots_) {
        if (free == slot || free == other) free = slot + other - free;
    }
}

void Residency::drop_unused_closed_slots() {
    if (occupied_closed_slots_ == 0) residents_.resize(at(slots_));
}

}  // namespace moeinf
