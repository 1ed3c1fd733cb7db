// Named spans of time for NVIDIA's profilers (NVTX). The library is looked for by name at the first
// range. Where it is absent, or no profiler listens, a range costs a few nanoseconds.
#pragma once

namespace moeinf {

// Open from construction to destruction, on one thread. Ranges of a thread nest.
class Range {
public:
    explicit Range(const char* name) noexcept;
    ~Range();
    Range(const Range&) = delete;
    Range& operator=(const Range&) = delete;
};

}  // namespace moeinf
