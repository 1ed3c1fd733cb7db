// A device with memory of its own, behind calls that only enqueue work: copies and waits run on
// streams, in order within each, and events tell between streams how far one has come. The CUDA
// room implements it; everything else sees this.
//
// Every call may be made from any thread. Errors are Error(kCapacity) where memory cannot be had
// and Error(kUnsupported), naming the call and the driver's words, where the device refuses.
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
    // Its memory is RAM: a driver made for tests.
    [[nodiscard]] virtual bool is_fake() const noexcept = 0;
    [[nodiscard]] virtual uint64_t free_bytes() const = 0;
    [[nodiscard]] virtual uint64_t total_bytes() const = 0;

    // Device memory: the addresses are reserved once, memory is mapped to them in pieces.
    virtual std::unique_ptr<Arena> make_arena(size_t reserve_bytes) = 0;
    // Page-locked RAM. A run of `unit` bytes that begins at a multiple of `unit` is locked as one,
    // so that one copy may cover it; `unit` is a multiple of 4096.
    virtual std::unique_ptr<Arena> make_pinned_arena(size_t reserve_bytes, size_t unit) = 0;

    virtual Stream create_stream(bool urgent) = 0;  // an urgent one goes first where both have work
    virtual void destroy_stream(Stream stream) noexcept = 0;
    virtual Event create_event() = 0;
    virtual void destroy_event(Event event) noexcept = 0;

    virtual void record(Event event, Stream stream) = 0;
    virtual void wait(Stream stream, Event event) = 0;  // the stream waits, the host does not
    [[nodiscard]] virtual bool finished(Event event) = 0;
    virtual void synchronize(Event event) = 0;  // the host waits

    // From now on the calling thread may ask for events while another one captures a graph; it
    // would end that capture otherwise.
    virtual void leave_captures_alone() noexcept = 0;

    // `host` is page-locked; both calls return before the bytes have moved.
    virtual void copy_in(std::byte* device, const std::byte* host, size_t nbytes,
                         Stream stream) = 0;
    virtual void copy_out(std::byte* host, const std::byte* device, size_t nbytes,
                          Stream stream) = 0;

    // The same bytes by one kernel for all parts, where this build has kernels for the device.
    // Addresses and sizes are multiples of 16; at most kMaxGatherParts parts.
    static constexpr size_t kMaxGatherParts = 64;
    [[nodiscard]] virtual bool can_gather() const noexcept = 0;
    virtual void gather(std::span<const GatherPart> parts, Stream stream) = 0;
};

}  // namespace moeinf
