// Measures how fast this machine reads a file from its disk. Benchmarks of the file reader use it
// as their limit, and `moeinf doctor` shows it. Never writes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace moeinf {

// One way of sequential reading and its result.
struct ReadWay {
    size_t request_bytes;
    int32_t in_flight;  // requests at the same time
    double bytes_per_second;
};

struct ReadBandwidth {
    std::string path;           // the file that was read
    bool direct;                // false: through the page cache
    std::vector<ReadWay> ways;  // fastest first
};

// Reads `path`, or the largest file of a folder, in several ways, each for a share of `seconds`.
// Throws Error(kRead) if it cannot be read, and Error(kInvalid) for a file below 1 MiB.
[[nodiscard]] ReadBandwidth read_bandwidth(const std::string& path, double seconds);

}  // namespace moeinf
