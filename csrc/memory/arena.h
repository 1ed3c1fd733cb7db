// One contiguous range of addresses of which a prefix is backed by memory. A slot pool is an arena
// cut into equal slots. The address never changes, so views of it stay valid across a resize.
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

    // Grows or shrinks the usable prefix. Memory beyond it is returned to the system. Throws
    // Error(kCapacity), and changes nothing, if the memory cannot be had.
    virtual void commit(size_t nbytes) = 0;
};

// Throws Error(kCapacity) unless `nbytes` fit into an arena of that reserve.
void check_fits(size_t nbytes, size_t reserved);

// RAM, in huge pages where the system allows them.
std::unique_ptr<Arena> make_host_arena(size_t reserve_bytes);

}  // namespace moeinf
