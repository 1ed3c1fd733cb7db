// Reads experts from files into slots on worker threads. A demand overtakes prefetches at the next
// chunk. Where files have copies, each chunk comes from the place that would end it first, and from
// another one if that fails. Knows files and addresses, but no residency, leases or policies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "layout/catalog.h"
#include "transfer/places.h"
#include "transfer/read_job.h"

namespace moeinf {

struct FileReaderOptions {
    int32_t threads = 0;     // for each place; 0: the measured default
    size_t chunk_bytes = 0;  // 0: the measured default
    bool direct = true;      // O_DIRECT where the file system allows it
};

class FileReader {
public:
    // Opens every file of the catalog, in every place. Throws Error(kRead) if one is missing,
    // unreadable or not of the catalog's size.
    FileReader(std::shared_ptr<const Catalog> catalog, FileReaderOptions options);

    // Waits for chunks in flight. A transfer with chunks that have not started ends as kCancelled.
    ~FileReader();
    FileReader(const FileReader&) = delete;
    FileReader& operator=(const FileReader&) = delete;

    // Starts reading every extent of `expert` into the slot that begins at `slot`. `done` is
    // called from a worker thread, or from the destructor for a transfer that never ran. Throws
    // Error(kUnsupported) in a forked child, where the reader has no threads.
    [[nodiscard]] ReadJobPtr submit(ExpertId expert, std::byte* slot, Priority priority,
                                    ReadCallback done);

    // Makes a queued or running prefetch a demand. No effect on a finished transfer.
    void promote(const ReadJobPtr& transfer);

    // Of the files themselves, then of each place of copies.
    [[nodiscard]] std::vector<PlaceStats> places() const;

    // True if reads of the file go past the page cache.
    [[nodiscard]] bool file_is_direct(uint32_t file) const;
    [[nodiscard]] const FileReaderOptions& options() const noexcept;

    struct Impl;

private:
    std::unique_ptr<Impl> impl_;
};

}  // namespace moeinf
