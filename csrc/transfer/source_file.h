// One file of experts, opened once for reading. Reads go past the page cache (O_DIRECT) if the file
// system allows it, and else through it. No byte stays in the page cache, because the slots keep
// the experts. Thread-safe. Never writes.
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "layout/catalog.h"
#include "transfer/read_plan.h"

namespace moeinf {

// A file descriptor that closes itself.
class Descriptor {
public:
    explicit Descriptor(int number) noexcept : number_(number) {}
    Descriptor(Descriptor&& other) noexcept : number_(other.number_) { other.number_ = -1; }
    Descriptor& operator=(Descriptor&&) = delete;
    ~Descriptor();

    [[nodiscard]] int number() const noexcept { return number_; }

private:
    int number_;
};

// A range to read: at least `need` bytes from `offset`, and up to `capacity` if the file has them.
struct ReadRequest {
    uint64_t offset;
    size_t need;
    size_t capacity;
    size_t alignment;  // of every offset and length passed to the system; 1: none
};

// Reads the range into `out` and goes on after short reads and signals. Throws Error(kRead) with
// `path` if the system reports an error or the file ends too early.
void read_fully(int descriptor, const std::string& path, const ReadRequest& request,
                std::byte* out);

class SourceFile {
public:
    // Throws Error(kRead) if the file is missing, unreadable, not a regular file, or has another
    // size than in the catalog.
    SourceFile(const CatalogFile& file, bool allow_direct);

    [[nodiscard]] bool direct() const noexcept { return alignment_ > 1; }

    // Of file offsets, lengths and addresses in direct reads. 1 if reads are buffered.
    [[nodiscard]] size_t alignment() const noexcept { return alignment_; }
    [[nodiscard]] uint64_t nbytes() const noexcept { return nbytes_; }
    [[nodiscard]] int descriptor() const noexcept { return descriptor_.number(); }

    // Called with the begin and the end of bytes of the slot, once they are there and while they
    // are in the cache of the CPU. It may throw.
    using Landed = std::function<void(uint64_t begin, uint64_t end)>;

    // Puts every piece in its place in `slot`; matrices of `transposes` are turned on the way.
    // `bounce` is aligned and holds the chunk, rounded to the alignment at both ends. Throws
    // Error(kRead) if a read fails or the file was changed after it was opened.
    void read(const Chunk& chunk, std::span<const Piece> pieces,
              std::span<const Transpose> transposes, std::byte* slot, std::span<std::byte> bounce,
              const Landed& landed = nullptr) const;

private:
    void read_direct(const Chunk& chunk, std::span<const Piece> pieces,
                     std::span<const Transpose> transposes, std::byte* slot,
                     std::span<std::byte> bounce, const Landed& landed) const;
    void read_buffered(const Chunk& chunk, std::span<const Piece> pieces,
                       std::span<const Transpose> transposes, std::byte* slot,
                       std::span<std::byte> bounce, const Landed& landed) const;
    void check_room(size_t nbytes, std::span<std::byte> bounce) const;
    void read_range(uint64_t offset, std::span<std::byte> out) const;
    void check_unchanged() const;

    std::string path_;
    uint64_t nbytes_;
    std::shared_ptr<const ByteSource> source_;  // in place of a file
    Descriptor descriptor_;
    timespec modified_{};
    size_t alignment_ = 1;
};

}  // namespace moeinf
