// How fast this machine reads a file from its disk: the limit that transfers are measured against,
// and a line of `moeinf doctor`. Reads only; keeps nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace moeinf {

// One way of reading in sequence, and what it gave.
struct ReadWay {
    size_t request_bytes;
    int32_t in_flight;  // requests at a time
    double bytes_per_second;
};

struct ReadBandwidth {
    std::string path;           // the file that was read
    bool direct;                // false: the page cache took part
    std::vector<ReadWay> ways;  // fastest first
};

// Reads `path` (of a folder: its largest file) in several ways, each for a share of `seconds`.
// Throws Error(kRead) where it cannot be read, Error(kInvalid) for a file too small to say anything
// (under 1 MiB).
[[nodiscard]] ReadBandwidth read_bandwidth(const std::string& path, double seconds);

}  // namespace moeinf
