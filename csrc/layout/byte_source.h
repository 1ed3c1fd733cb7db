// Bytes of experts that lie in no file: the caller's memory, or what a callback writes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace moeinf {

class ByteSource {
public:
    ByteSource() = default;
    virtual ~ByteSource() = default;
    ByteSource(const ByteSource&) = delete;
    ByteSource& operator=(const ByteSource&) = delete;

    // Writes the bytes from `offset` into `out`. Called by several threads at once. Throws
    // Error(kRead).
    virtual void read(uint64_t offset, std::span<std::byte> out) const = 0;

    // True if a segment of an expert must be asked for in one call.
    [[nodiscard]] virtual bool whole_segments() const noexcept { return false; }
};

}  // namespace moeinf
