// How fast this machine reads a file from its disk: the limit that transfers are measured against,
// and a line of `moeinf doctor`. Reads only; keeps nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace moeinf {

struct ReadBandwidth {
    double bytes_per_second;
    bool direct;           // false: the file system refused O_DIRECT, the page cache took part
    size_t request_bytes;  // of the way of asking that was fastest
    int32_t in_flight;     // requests at a time
    std::string path;      // the file that was read
};

// The best of several ways of reading `path` in sequence (of a folder: its largest file), each for
// a share of `seconds`. Throws Error(kRead) where it cannot be read, Error(kInvalid) for a file too
// small to say anything (under 1 MiB).
[[nodiscard]] ReadBandwidth read_bandwidth(const std::string& path, double seconds);

}  // namespace moeinf
