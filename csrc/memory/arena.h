// One contiguous range of addresses. Memory backs the first part of it. A slot pool is an arena
// that is divided into equal slots. The address never changes, so views of it stay valid across a
// resize.
#pragma once

#include <cstddef>
#include <memory>

namespace moeinf {

class Arena {
public:
    virtual ~Arena() = default;

    [[nodiscard]] virtual std::byte* data() const noexcept = 0;
    [[nodiscard]] virtual size_t reserved() const noexcept = 0;   // bytes of address range
    [[nodiscard]] virtual size_t committed() const noexcept = 0;  // bytes that may be touched

    // Grows or shrinks the part that memory backs. Memory behind it returns to the system. Throws
    // Error(kCapacity) and changes nothing if there is not enough memory.
    virtual void commit(size_t nbytes) = 0;
};

// Throws Error(kCapacity) if `nbytes` do not fit into an arena of `reserved` bytes.
void check_fits(size_t nbytes, size_t reserved);

// RAM, in huge pages if the system allows them.
std::unique_ptr<Arena> make_host_arena(size_t reserve_bytes);

}  // namespace moeinf
