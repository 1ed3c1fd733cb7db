// One expert on its way from files into one slot.
//
//     kQueued ---> kRunning ---> kDone or kFailed
//        +------------+-------> kCancelled, if the reader ends before the last chunk has started
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "base/ids.h"

namespace moeinf {

enum class Priority : uint8_t { kDemand = 0, kPrefetch = 1 };

enum class TransferState : uint8_t { kQueued, kRunning, kDone, kFailed, kCancelled };

class Transfer {
public:
    [[nodiscard]] ExpertId expert() const noexcept { return expert_; }
    [[nodiscard]] TransferState state() const noexcept {
        return state_.load(std::memory_order_acquire);
    }
    [[nodiscard]] const std::string& error() const noexcept { return error_; }  // once kFailed

private:
    friend struct TransferAccess;
    ExpertId expert_ = ExpertId::kNone;
    std::atomic<TransferState> state_{TransferState::kQueued};
    std::string error_;
};

// Only code that moves transfers uses this.
struct TransferAccess {
    static void begin(Transfer& transfer, ExpertId expert) { transfer.expert_ = expert; }
    static void set_state(Transfer& transfer, TransferState state) {
        transfer.state_.store(state, std::memory_order_release);
    }
    static void set_error(Transfer& transfer, std::string error) {
        transfer.error_ = std::move(error);
    }
};

using TransferPtr = std::shared_ptr<Transfer>;

// Called exactly once per transfer, while no lock is held that its owner may need. It may call the
// object that moves the transfer, but must not throw or destroy that object.
using TransferCallback = std::function<void(const TransferPtr&)>;

}  // namespace moeinf
