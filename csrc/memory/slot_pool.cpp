#include "memory/slot_pool.h"

#include <string>
#include <utility>

#include "base/error.h"
#include "base/sizes.h"

namespace moeinf {

SlotPool::SlotPool(std::unique_ptr<Arena> arena, uint64_t slot_bytes, int32_t capacity,
                   int32_t slots)
    : arena_(std::move(arena)), slot_bytes_(slot_bytes), capacity_(capacity), slots_(0) {
    if (arena_ == nullptr) throw Error(ErrorCode::kInvalid, "a slot pool needs an arena");
    if (slot_bytes == 0 || slot_bytes % kPage != 0) {
        throw Error(ErrorCode::kInvalid, "expected slots of a multiple of 4096 bytes, found " +
                                             std::to_string(slot_bytes));
    }
    if (capacity < 0 || static_cast<uint64_t>(capacity) > arena_->reserved() / slot_bytes) {
        throw Error(ErrorCode::kInvalid, "an arena of " + std::to_string(arena_->reserved()) +
                                             " bytes cannot be cut into " +
                                             std::to_string(capacity) + " slots of " +
                                             std::to_string(slot_bytes) + " bytes");
    }
    resize(slots);
}

std::byte* SlotPool::slot(SlotId slot) const noexcept {
    return arena_->data() + index(slot) * slot_bytes_;
}

void SlotPool::resize(int32_t slots) {
    if (slots < 0) {
        throw Error(ErrorCode::kInvalid,
                    "expected a number of slots, found " + std::to_string(slots));
    }
    if (slots > capacity_) {
        throw Error(ErrorCode::kCapacity, "a pool of at most " + std::to_string(capacity_) +
                                              " slots cannot have " + std::to_string(slots));
    }
    const std::lock_guard lock(mutex_);
    if (slots > backed_ || views_ == 0) {
        arena_->commit(static_cast<uint64_t>(slots) * slot_bytes_);
        backed_ = slots;
    }
    slots_ = slots;
}

int32_t SlotPool::begin_view() const {
    const std::lock_guard lock(mutex_);
    ++views_;
    return backed_;
}

void SlotPool::end_view() const noexcept {
    const std::lock_guard lock(mutex_);
    if (--views_ > 0 || backed_ == slots_) return;
    try {
        arena_->commit(static_cast<uint64_t>(slots_) * slot_bytes_);
        backed_ = slots_;
    } catch (const Error&) {  // the next resize tries again
    }
}

}  // namespace moeinf
