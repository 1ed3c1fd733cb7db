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

enum class ReadState : uint8_t { kQueued, kRunning, kDone, kFailed, kCancelled };

class ReadJob {
public:
    [[nodiscard]] ExpertId expert() const noexcept { return expert_; }
    [[nodiscard]] ReadState state() const noexcept {
        return state_.load(std::memory_order_acquire);
    }
    [[nodiscard]] const std::string& error() const noexcept { return error_; }  // once kFailed

private:
    friend struct ReadJobAccess;
    ExpertId expert_ = ExpertId::kNone;
    std::atomic<ReadState> state_{ReadState::kQueued};
    std::string error_;
};

// Only code that moves transfers uses this.
struct ReadJobAccess {
    static void begin(ReadJob& transfer, ExpertId expert) { transfer.expert_ = expert; }
    static void set_state(ReadJob& transfer, ReadState state) {
        transfer.state_.store(state, std::memory_order_release);
    }
    static void set_error(ReadJob& transfer, std::string error) {
        transfer.error_ = std::move(error);
    }
};

using ReadJobPtr = std::shared_ptr<ReadJob>;

// Called exactly once per transfer, while no lock is held that its owner may need. It may call the
// object that moves the transfer, but must not throw or destroy that object.
using ReadCallback = std::function<void(const ReadJobPtr&)>;

}  // namespace moeinf
