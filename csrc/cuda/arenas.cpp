#include "cuda/arenas.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/sizes.h"

namespace moeinf::cuda {
namespace {

constexpr size_t kMaxDevicePiece = size_t{64} << 20;
constexpr size_t kMaxPinnedPiece = size_t{256} << 20;
constexpr size_t kPiecesWanted = 32;  // a shrink keeps less than one piece too much: 1/32

// The size of a piece: a whole number of units, at least one, for about kPiecesWanted pieces.
size_t piece_bytes(size_t reserved, size_t unit, size_t most) {
    const size_t wanted = std::min(reserved / kPiecesWanted, most);
    return std::max(wanted / unit, size_t{1}) * unit;
}

void check_reserve(size_t nbytes, size_t unit) {
    if (nbytes == 0 || nbytes > std::numeric_limits<size_t>::max() / 2 - unit) {
        throw Error(ErrorCode::kInvalid,
                    "expected an arena of at least 1 byte and within the address space, found " +
                        std::to_string(nbytes) + " bytes");
    }
}

// Pieces without gaps from offset 0 on. Both arenas use it.
struct Piece {
    size_t offset;
    size_t nbytes;
    MemoryHandle memory;  // device memory only

    [[nodiscard]] size_t end() const { return offset + nbytes; }
};

size_t present_bytes(const std::vector<Piece>& pieces) {
    return pieces.empty() ? 0 : pieces.back().end();
}

class DeviceArena final : public Arena {
public:
    DeviceArena(std::shared_ptr<const Context> context, size_t nbytes)
        : context_(std::move(context)), driver_(context_->driver()), reserved_(nbytes) {
        const ContextGuard current(*context_);
        properties_.type = kAllocationPinned;
        properties_.location = {kLocationDevice, context_->index()};
        driver_.check(driver_.mem_get_granularity(&unit_, &properties_, kGranularityMinimum),
                      "cuMemGetAllocationGranularity");
        check_reserve(nbytes, unit_);
        piece_ = piece_bytes(nbytes, unit_, kMaxDevicePiece);
        const Result result = driver_.mem_address_reserve(&base_, round_up(nbytes, unit_), 0, 0, 0);
        if (result != kSuccess) {
            throw Error(ErrorCode::kCapacity,
                        "cannot reserve " + std::to_string(nbytes) +
                            " bytes of device addresses: " + driver_.words(result));
        }
    }

    ~DeviceArena() override {
        const ContextGuard current(*context_, ContextGuard::For::kDestructor);
        if (!current) return;
        shrink(0);
        driver_.mem_address_free(base_, round_up(reserved_, unit_));
    }

    DeviceArena(const DeviceArena&) = delete;
    DeviceArena& operator=(const DeviceArena&) = delete;

    std::byte* data() const noexcept override { return reinterpret_cast<std::byte*>(base_); }
    size_t reserved() const noexcept override { return reserved_; }
    size_t committed() const noexcept override { return committed_; }

    void commit(size_t nbytes) override {
        check_fits(nbytes, reserved_);
        const ContextGuard current(*context_);
        const size_t wanted = round_up(nbytes, unit_);
        if (wanted > present_bytes(pieces_)) grow(wanted);
        shrink(wanted);
        committed_ = nbytes;
    }

private:
    void grow(size_t wanted) {
        const size_t before = present_bytes(pieces_);
        pieces_.reserve(pieces_.size() + (wanted - before) / piece_ + 1);
        while (present_bytes(pieces_) < wanted) {
            const size_t present = present_bytes(pieces_);
            const Result result = map(present, std::min(piece_, wanted - present));
            if (result == kSuccess) continue;
            shrink(before);
            size_t free = 0;
            size_t total = 0;
            driver_.mem_get_info(&free, &total);
            throw Error(ErrorCode::kCapacity,
                        "cannot grow a device arena from " + std::to_string(before) + " to " +
                            std::to_string(wanted) + " bytes: " + std::to_string(free) + " of " +
                            std::to_string(total) + " bytes are free; " + driver_.words(result));
        }
    }

    Result map(size_t offset, size_t nbytes) {
        MemoryHandle memory = 0;
        Result result = driver_.mem_create(&memory, nbytes, &properties_, 0);
        if (result != kSuccess) return result;
        result = driver_.mem_map(base_ + offset, nbytes, 0, memory, 0);
        if (result != kSuccess) {
            driver_.mem_release(memory);
            return result;
        }
        const MemoryAccess access{properties_.location, kAccessReadWrite};
        result = driver_.mem_set_access(base_ + offset, nbytes, &access, 1);
        if (result != kSuccess) {
            driver_.mem_unmap(base_ + offset, nbytes);
            driver_.mem_release(memory);
            return result;
        }
        pieces_.push_back({offset, nbytes, memory});
        return kSuccess;
    }

    // Releases every piece that begins at `wanted` or later.
    void shrink(size_t wanted) noexcept {
        while (!pieces_.empty() && pieces_.back().offset >= wanted) {
            const Piece& last = pieces_.back();
            driver_.mem_unmap(base_ + last.offset, last.nbytes);
            driver_.mem_release(last.memory);
            pieces_.pop_back();
        }
    }

    std::shared_ptr<const Context> context_;
    const Driver& driver_;
    size_t reserved_;
    size_t committed_ = 0;
    size_t unit_ = 0;
    size_t piece_ = 0;
    MemoryProperties properties_{};
    DevicePointer base_ = 0;
    std::vector<Piece> pieces_;
};

class PinnedArena final : public Arena {
public:
    PinnedArena(std::shared_ptr<const Context> context, size_t nbytes, size_t unit)
        : context_(std::move(context)),
          driver_(context_->driver()),
          reserved_(nbytes),
          unit_(unit) {
        if (unit == 0 || unit % kPage != 0) {
            throw Error(ErrorCode::kInvalid,
                        "expected pinned memory in units of a multiple of 4096 bytes, found " +
                            std::to_string(unit));
        }
        check_reserve(nbytes, unit);
        piece_ = piece_bytes(nbytes, unit, kMaxPinnedPiece);
        memory_ = make_host_arena(round_up(nbytes, unit));
    }

    ~PinnedArena() override {
        const ContextGuard current(*context_, ContextGuard::For::kDestructor);
        if (current) unlock(0);
    }

    PinnedArena(const PinnedArena&) = delete;
    PinnedArena& operator=(const PinnedArena&) = delete;

    std::byte* data() const noexcept override { return memory_->data(); }
    size_t reserved() const noexcept override { return reserved_; }
    size_t committed() const noexcept override { return committed_; }

    void commit(size_t nbytes) override {
        check_fits(nbytes, reserved_);
        const ContextGuard current(*context_);
        // Locks whole units. Half a unit could not be locked as one piece when the arena grows
        // again.
        const size_t wanted = round_up(nbytes, unit_);
        const size_t before = present_bytes(pieces_);
        if (wanted > before) {
            memory_->commit(wanted);
            lock(before, wanted);
        }
        unlock(wanted);
        memory_->commit(present_bytes(pieces_));
        committed_ = nbytes;
    }

private:
    void lock(size_t before, size_t wanted) {
        pieces_.reserve(pieces_.size() + (wanted - before) / piece_ + 1);
        while (present_bytes(pieces_) < wanted) {
            const size_t present = present_bytes(pieces_);
            const size_t nbytes = std::min(piece_, wanted - present);
            const Result result = driver_.host_register(data() + present, nbytes,
                                                        kRegisterPortable | kRegisterDeviceMap);
            if (result != kSuccess) {
                unlock(before);
                memory_->commit(before);
                throw Error(ErrorCode::kCapacity, "cannot page-lock " + std::to_string(wanted) +
                                                      " bytes of RAM, " + std::to_string(present) +
                                                      " were locked: " + driver_.words(result));
            }
            pieces_.push_back({present, nbytes, 0});
        }
    }

    void unlock(size_t wanted) noexcept {
        while (!pieces_.empty() && pieces_.back().offset >= wanted) {
            driver_.host_unregister(data() + pieces_.back().offset);
            pieces_.pop_back();
        }
    }

    std::shared_ptr<const Context> context_;
    const Driver& driver_;
    size_t reserved_;
    size_t committed_ = 0;
    size_t unit_;
    size_t piece_ = 0;
    std::unique_ptr<Arena> memory_;
    std::vector<Piece> pieces_;
};

}  // namespace

std::unique_ptr<Arena> make_device_arena(std::shared_ptr<const Context> context,
                                         size_t reserve_bytes) {
    return std::make_unique<DeviceArena>(std::move(context), reserve_bytes);
}

std::unique_ptr<Arena> make_pinned_arena(std::shared_ptr<const Context> context,
                                         size_t reserve_bytes, size_t unit) {
    return std::make_unique<PinnedArena>(std::move(context), reserve_bytes, unit);
}

}  // namespace moeinf::cuda
