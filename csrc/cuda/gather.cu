// Copies parts from mapped RAM to device memory; blocks with index y copy part y. Each thread keeps
// four 16-byte loads in flight, because the latency of the link is a thousand times its time per
// load.
#include "cuda/gather_table.h"

extern "C" __global__ void moeinf_gather(const moeinf::cuda::GatherTable table) {
    const moeinf::cuda::GatherTable::Part& part = table.parts[blockIdx.y];
    const uint4* source = reinterpret_cast<const uint4*>(part.source);
    uint4* target = reinterpret_cast<uint4*>(part.target);
    const uint64_t count = part.nbytes / sizeof(uint4);
    const uint64_t stride = uint64_t{gridDim.x} * blockDim.x;
    uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    for (; i + 3 * stride < count; i += 4 * stride) {
        const uint4 a = __ldcs(source + i);
        const uint4 b = __ldcs(source + i + stride);
        const uint4 c = __ldcs(source + i + 2 * stride);
        const uint4 d = __ldcs(source + i + 3 * stride);
        target[i] = a;
        target[i + stride] = b;
        target[i + 2 * stride] = c;
        target[i + 3 * stride] = d;
    }
    for (; i < count; i += stride) target[i] = __ldcs(source + i);
}
