// Reads experts from files into slots on worker threads. Demand overtakes prefetch at the next
// chunk. Knows files and addresses; never residency, leases or policies.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "layout/catalog.h"

namespace moeinf {

enum class Priority : uint8_t { kDemand = 0, kPrefetch = 1 };

enum class TransferState : uint8_t { kQueued, kRunning, kDone, kFailed, kCancelled };

// One expert on its way into one slot.
class Transfer {
public:
    [[nodiscard]] int32_t expert() const noexcept { return expert_; }  // flat id
    [[nodiscard]] TransferState state() const noexcept {
        return state_.load(std::memory_order_acquire);
    }
    [[nodiscard]] const std::string& error() const noexcept { return error_; }  // once kFailed

private:
    friend class CopyEngine;
    friend struct TransferAccess;
    int32_t expert_ = -1;
    std::atomic<TransferState> state_{TransferState::kQueued};
    std::string error_;
};

using TransferPtr = std::shared_ptr<Transfer>;
// Called exactly once per transfer, from a worker thread (or from cancel() and the destructor for a
// transfer that never ran), with no lock of the engine held. It may call the engine, but must not
// throw or destroy it.
using TransferCallback = std::function<void(const TransferPtr&)>;

struct CopyEngineOptions {
    int32_t threads = 0;     // 0: the measured default
    size_t chunk_bytes = 0;  // 0: the measured default
    bool direct = true;      // O_DIRECT where the file system allows it
};

class CopyEngine {
public:
    // Opens every file of the catalog. Throws Error(kRead) if one is missing, unreadable or not of
    // the catalog's size.
    CopyEngine(std::shared_ptr<const Catalog> catalog, CopyEngineOptions options);

    // Waits for chunks in flight. What is queued, or has chunks left to start, ends as kCancelled.
    ~CopyEngine();
    CopyEngine(const CopyEngine&) = delete;
    CopyEngine& operator=(const CopyEngine&) = delete;

    // Starts reading every extent of `flat_expert` into the slot that begins at `slot`. Throws
    // Error(kUnsupported) in a forked child, where the engine has no threads.
    [[nodiscard]] TransferPtr submit(int32_t flat_expert, std::byte* slot, Priority priority,
                                     TransferCallback done);

    // Turns a queued or running prefetch into a demand. No effect on a finished transfer.
    void promote(const TransferPtr& transfer);

    // True if the transfer had not started: it ends as kCancelled and its slot was never touched.
    bool cancel(const TransferPtr& transfer);

    // How the bytes move here: "direct" or "buffered", for each file.
    [[nodiscard]] bool file_is_direct(uint32_t file) const;
    [[nodiscard]] const CopyEngineOptions& options() const noexcept;

    struct Impl;

private:
    std::unique_ptr<Impl> impl_;
};

}  // namespace moeinf
