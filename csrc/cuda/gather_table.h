// The one argument of the kernel moeinf_gather, passed by value; read by host and device code.
#pragma once

#include <cstdint>

namespace moeinf::cuda {

struct GatherTable {
    static constexpr int kMax = 64;

    struct Part {
        uint64_t source;  // addresses as the device sees them
        uint64_t target;
        uint64_t nbytes;  // a multiple of 16, like both addresses
    };
    Part parts[kMax];
};
static_assert(sizeof(GatherTable) <= 4096, "larger than the parameters of a kernel may be");

}  // namespace moeinf::cuda
