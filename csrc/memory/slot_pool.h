// A pool of equal slots in one arena. It does not know the contents of its slots.
//
// A view is a reader outside the core that no lease holds back, such as a tensor. While one lives,
// a pool that shrinks keeps the memory of the slots that go:
//
//   resize(fewer), no view       the memory goes back to the system at once
//   resize(fewer), views         the memory stays; it goes back when the last view ends
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "base/ids.h"
#include "memory/arena.h"

namespace moeinf {

class SlotPool {
public:
    // Reserves addresses for `capacity` slots. Memory backs the first `slots` of them.
    // `slot_bytes` must be a multiple of 4096.
    SlotPool(std::unique_ptr<Arena> arena, uint64_t slot_bytes, int32_t capacity, int32_t slots);

    [[nodiscard]] std::byte* slot(SlotId slot) const noexcept;
    [[nodiscard]] std::byte* data() const noexcept { return arena_->data(); }
    [[nodiscard]] uint64_t slot_bytes() const noexcept { return slot_bytes_; }
    [[nodiscard]] int32_t slots() const noexcept { return slots_; }
    [[nodiscard]] int32_t capacity() const noexcept { return capacity_; }

    // Throws Error(kCapacity) and keeps its size if there is no memory for more slots.
    void resize(int32_t slots);

    // Begins a view of as many slots as it returns: those that memory backs. Thread-safe.
    [[nodiscard]] int32_t begin_view() const;
    void end_view() const noexcept;

private:
    std::unique_ptr<Arena> arena_;
    uint64_t slot_bytes_;
    int32_t capacity_;
    int32_t slots_;
    mutable std::mutex mutex_;    // of the following
    mutable int32_t backed_ = 0;  // slots that memory backs, at least slots_
    mutable int32_t views_ = 0;
};

}  // namespace moeinf
