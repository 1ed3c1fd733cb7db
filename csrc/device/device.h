// A device with its own memory. Its calls only enqueue work. Copies and waits run on streams, in
// order within each stream. An event marks a place in one stream, and another stream can wait for
// it. The room cuda implements this interface; all other rooms use it.
//
// Any thread may make any call. Error(kCapacity) means that there is not enough memory.
// Error(kUnsupported) names the call that the device refused, and the driver's message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "memory/arena.h"

namespace moeinf {

using Stream = void*;  // opaque; nullptr is the device's default stream
using Event = void*;   // opaque

// A run of bytes from RAM that the device can read to its own memory.
struct GatherPart {
    const std::byte* source;
    std::byte* target;
    uint64_t nbytes;
};

class Device {
public:
    virtual ~Device() = default;

    [[nodiscard]] virtual std::string name() const = 0;
    [[nodiscard]] virtual int32_t index() const noexcept = 0;
    [[nodiscard]] virtual int32_t driver_version() const = 0;  // 13010: CUDA 13.1
    // A driver for tests, whose device memory is RAM.
    [[nodiscard]] virtual bool is_fake() const noexcept = 0;
    [[nodiscard]] virtual uint64_t free_bytes() const = 0;
    [[nodiscard]] virtual uint64_t total_bytes() const = 0;

    // Device memory. Addresses are reserved once, and memory is mapped to them in pieces.
    virtual std::unique_ptr<Arena> make_arena(size_t reserve_bytes) = 0;
    // Page-locked RAM. Each `unit` bytes from a multiple of `unit` on are locked in one piece, so
    // one copy may cover them. `unit` is a multiple of 4096.
    virtual std::unique_ptr<Arena> make_pinned_arena(size_t reserve_bytes, size_t unit) = 0;

    virtual Stream create_stream(bool urgent) = 0;  // an urgent stream's work goes first
    virtual void destroy_stream(Stream stream) noexcept = 0;
    virtual Event create_event() = 0;
    virtual void destroy_event(Event event) noexcept = 0;

    virtual void record(Event event, Stream stream) = 0;
    virtual void wait(Stream stream, Event event) = 0;  // the stream waits, the host does not
    [[nodiscard]] virtual bool finished(Event event) = 0;
    virtual void synchronize(Event event) = 0;  // the host waits

    // For the calling thread: its calls no longer end a graph capture of another thread.
    virtual void set_relaxed_capture_mode() noexcept = 0;

    // `host` is page-locked. Both calls return before the bytes have moved.
    virtual void copy_in(std::byte* device, const std::byte* host, size_t nbytes,
                         Stream stream) = 0;
    virtual void copy_out(std::byte* host, const std::byte* device, size_t nbytes,
                          Stream stream) = 0;

    // Copies all parts with one kernel, if this build has kernels for the device. Addresses and
    // sizes are multiples of 16. At most kMaxGatherParts parts.
    static constexpr size_t kMaxGatherParts = 64;
    [[nodiscard]] virtual bool can_gather() const noexcept = 0;
    virtual void gather(std::span<const GatherPart> parts, Stream stream) = 0;
};

}  // namespace moeinf
