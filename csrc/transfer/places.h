// The places that hold the files of a catalog: the files themselves, and copies of all or some of
// them on other disks. Chooses the place of each read by the measured speed of the places.
//
//                 a read fails
//   in use ----------------------> avoided: asked only after every other place has failed
//
// All functions but file() are called with the reader's lock held.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <list>
#include <optional>
#include <string>
#include <vector>

#include "layout/catalog.h"
#include "transfer/source_file.h"

namespace moeinf {

struct PlaceStats {
    int64_t read_bytes = 0;
    double bytes_per_second = 0;  // of all reads in flight together; 0: not measured yet
    std::string failure;          // the first one; empty: none
};

class Places {
public:
    using Clock = std::chrono::steady_clock;

    struct Reading {
        uint32_t place = 0;
        uint64_t nbytes = 0;
        uint64_t waiting = 0;  // bytes in flight at the place when it began, with its own
        Clock::time_point began{};
    };
    using ReadingRef = std::list<Reading>::iterator;

    // Opens every file in every place. Throws Error(kRead) as SourceFile does.
    Places(const Catalog& catalog, bool allow_direct, int32_t most_reads);

    [[nodiscard]] uint32_t count() const noexcept { return static_cast<uint32_t>(places_.size()); }
    [[nodiscard]] size_t alignment() const noexcept { return alignment_; }  // of all files
    [[nodiscard]] const SourceFile& file(uint32_t file, uint32_t place) const {
        return *files_[file][place];
    }

    // The place that would end a read of so many bytes first. Nothing if it has as many reads in
    // flight as it may have: to wait for it is faster than to read elsewhere.
    [[nodiscard]] std::optional<uint32_t> choose(uint32_t file, uint64_t nbytes) const;
    // After a failure: the next place to ask, of those whose bit in `tried` is 0.
    [[nodiscard]] std::optional<uint32_t> choose_next(uint32_t file, uint64_t nbytes,
                                                      uint32_t tried) const;

    [[nodiscard]] ReadingRef begin(uint32_t place, uint64_t nbytes);
    void end(ReadingRef reading, const std::string& failure);

    [[nodiscard]] std::vector<PlaceStats> stats() const;

private:
    struct Place {
        std::list<Reading> readings;  // in flight, oldest first
        uint64_t waiting = 0;         // their bytes
        double seconds_per_byte = 0;  // 0: not measured yet
        Clock::time_point last_end{};
        PlaceStats stats;
    };

    [[nodiscard]] double seconds(const Place& place, uint64_t nbytes, Clock::time_point now) const;
    [[nodiscard]] std::optional<uint32_t> best(uint32_t file, uint64_t nbytes,
                                               uint32_t tried) const;

    const size_t most_reads_;  // in flight at one place
    size_t alignment_ = 1;
    std::deque<SourceFile> opened_;
    std::vector<std::vector<const SourceFile*>> files_;  // [file][place]; null: not there
    std::vector<Place> places_;
    std::list<Reading> spare_;  // so that a read allocates nothing
};

}  // namespace moeinf
