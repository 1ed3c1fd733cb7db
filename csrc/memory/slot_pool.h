// A pool of equal slots in one arena. It does not know the contents of its slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

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

private:
    std::unique_ptr<Arena> arena_;
    uint64_t slot_bytes_;
    int32_t capacity_;
    int32_t slots_;
};

}  // namespace moeinf
