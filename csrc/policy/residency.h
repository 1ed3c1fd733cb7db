// Which expert sits in which slot, and what a step changes about it. Pure bookkeeping: no threads,
// no bytes. The live cache drives it under its lock; the simulator drives it alone.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "policy/policy.h"

namespace moeinf {

// An expert that must be brought into `slot`, where `evicted` sat (-1: the slot was free).
struct Placement {
    int32_t expert;
    int32_t slot;
    int32_t evicted;
};

// What one step needs. Cleared and reused from step to step, so that planning does not allocate.
struct Plan {
    std::vector<int32_t> hits;          // resident before the step
    std::vector<Placement> placements;  // misses that get a slot, in routing order
    std::vector<int32_t> surplus;       // misses beyond what slots can hold: they pass through
};

class Residency {
public:
    // Throws Error(kInvalid) for fewer than one slot or no policy.
    Residency(PolicyShape shape, int32_t slots, std::unique_ptr<Policy> policy);

    // Shows the step to the policy, then places its experts.
    void plan(const Step& step, Plan& out);

    // Counts exactly as the simulator documents: members of the set are never victims; misses are
    // inserted in the order given; what does not fit passes through and is not kept.
    void insert(std::span<const int32_t> experts, Plan& out);

    // Makes room for one absent expert outside any step (a prefetch). False if nothing may be
    // evicted.
    bool place(int32_t expert, Placement& out);

    // Takes a resident out (its read failed, or its slot goes away). It must not be pinned.
    void remove(int32_t expert);

    // A pinned expert is never a victim. Pins count.
    void pin(int32_t expert) noexcept { ++pins_[static_cast<size_t>(expert)]; }
    void unpin(int32_t expert) noexcept { --pins_[static_cast<size_t>(expert)]; }
    [[nodiscard]] bool pinned(int32_t expert) const noexcept {
        return pins_[static_cast<size_t>(expert)] != 0;
    }

    [[nodiscard]] int32_t slot_of(int32_t expert) const noexcept {
        return slot_of_[static_cast<size_t>(expert)];
    }  // -1: absent
    [[nodiscard]] std::span<const int32_t> residents() const noexcept {
        return residents_;
    }  // by slot, -1: free; closed slots that are still occupied come last
    [[nodiscard]] int32_t slots() const noexcept { return slots_; }

    [[nodiscard]] bool has_free_slot() const noexcept { return !free_slots_.empty(); }

    // How many experts could be placed now: free slots and residents that may be evicted.
    [[nodiscard]] int32_t room() const noexcept;

    // Opens free slots at the end, or closes slots from the end. Residents of closed slots leave at
    // once, but a pinned one stays until its owner has unpinned and removed it; nothing else ever
    // enters a closed slot. Growing again reopens them.
    void resize(int32_t slots);
    // Two open slots trade places: whoever sits in one is found in the other.
    void exchange(int32_t slot, int32_t other);
    [[nodiscard]] int32_t occupied_closed_slots() const noexcept { return occupied_closed_slots_; }

    [[nodiscard]] Policy& policy() noexcept { return *policy_; }

private:
    void enter(int32_t expert, int32_t slot, int32_t evicted, Placement& out);
    void drop_unused_closed_slots();

    PolicyShape shape_;
    std::unique_ptr<Policy> policy_;
    int32_t slots_;
    int32_t occupied_closed_slots_ = 0;
    std::vector<int32_t> slot_of_;            // by flat expert
    std::vector<int32_t> residents_;          // by slot
    std::vector<uint32_t> pins_;              // by flat expert
    std::vector<int32_t> free_slots_;         // open ones; the next to use is last
    std::vector<int32_t> missing_, victims_;  // scratch
};

}  // namespace moeinf
