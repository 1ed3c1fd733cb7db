#include "transfer/source_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/sizes.h"
#include "transfer/direct_io.h"
#include "transfer/transpose.h"

namespace moeinf {
namespace {

[[noreturn]] void read_error(const std::string& path, const std::string& what) {
    throw Error(ErrorCode::kRead, path + ": " + what);
}

std::string number(uint64_t value) {
    return std::to_string(value);
}

int open_file(const std::string& path) {
    // Non-blocking, because opening a pipe would wait for its writer.
    const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (descriptor < 0) read_error(path, std::string("cannot be opened: ") + strerror(errno));
    return descriptor;
}

struct stat status_of(int descriptor, const std::string& path) {
    struct stat status{};
    if (fstat(descriptor, &status) != 0) {
        read_error(path, std::string("cannot be examined: ") + strerror(errno));
    }
    return status;
}

uint64_t round_down(uint64_t value, uint64_t unit) {
    return value / unit * unit;
}

// copy(offset, bytes) for a piece: all at once, or in parts that a cache holds until `landed` has
// seen them. A part ends where a block of the file does, so it cuts no number that a chunk does
// not.
template <class Copy>
void in_steps(const Piece& piece, const SourceFile::Landed& landed, const Copy& copy) {
    constexpr uint64_t kStep = 64 << 10;
    if (!landed) return copy(0, piece.nbytes);
    for (uint64_t from = 0, to = 0; from < piece.nbytes; from = to) {
        to = std::min(piece.nbytes,
                      round_down(piece.file_offset + from + kStep, kStep) - piece.file_offset);
        copy(from, to - from);
        landed(piece.slot_offset + from, piece.slot_offset + to);
    }
}
}  // namespace

Descriptor::~Descriptor() {
    if (number_ >= 0) close(number_);
}

void read_fully(int descriptor, const std::string& path, const ReadRequest& request,
                std::byte* out) {
    size_t have = 0;
    while (have < request.need) {
        // A short direct read may end inside a block. Then the block is read again.
        const size_t from = round_down(have, request.alignment);
        const ssize_t count = pread(descriptor, out + from, request.capacity - from,
                                    static_cast<off_t>(request.offset + from));
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) {
            read_error(path, "reading " + number(request.need) + " bytes at offset " +
                                 number(request.offset) + " failed: " + strerror(errno));
        }
        if (from + static_cast<size_t>(count) <= have) {
            read_error(path, "expected " + number(request.need) + " bytes at offset " +
                                 number(request.offset) + ", found " + number(have) +
                                 ": the file ends at " + number(request.offset + have));
        }
        have = from + static_cast<size_t>(count);
    }
}

SourceFile::SourceFile(const CatalogFile& file, bool allow_direct)
    : path_(file.path),
      nbytes_(file.nbytes),
      source_(file.source),
      descriptor_(source_ != nullptr ? -1 : open_file(file.path)) {
    if (source_ != nullptr) return;
    const struct stat status = status_of(descriptor_.number(), path_);
    if (!S_ISREG(status.st_mode)) read_error(path_, "expected a regular file");
    if (static_cast<uint64_t>(status.st_size) != nbytes_) {
        read_error(path_, "expected a file of " + number(nbytes_) + " bytes, found " +
                              number(static_cast<uint64_t>(status.st_size)));
    }
    modified_ = status.st_mtim;
    if (allow_direct) alignment_ = enable_direct_io(descriptor_.number());
    // Experts are read in random order, so the kernel's read-ahead would be useless.
    if (!direct()) (void)posix_fadvise(descriptor_.number(), 0, 0, POSIX_FADV_RANDOM);
}

void SourceFile::read(const Chunk& chunk, std::span<const Piece> pieces,
                      std::span<const Transpose> transposes, std::byte* slot,
                      std::span<std::byte> bounce, const Landed& landed) const {
    if (direct()) {
        read_direct(chunk, pieces, transposes, slot, bounce, landed);
    } else {
        read_buffered(chunk, pieces, transposes, slot, bounce, landed);
    }
    check_unchanged();
}

void SourceFile::read_direct(const Chunk& chunk, std::span<const Piece> pieces,
                             std::span<const Transpose> transposes, std::byte* slot,
                             std::span<std::byte> bounce, const Landed& landed) const {
    const uint64_t begin = round_down(chunk.begin, alignment_);
    const size_t capacity = static_cast<size_t>(round_up(chunk.end, alignment_) - begin);
    const ReadRequest request{begin, static_cast<size_t>(chunk.end - begin), capacity, alignment_};

    std::byte* const target = slot + pieces.front().slot_offset;
    const bool fits_in_place = transposes.empty() && pieces.size() == 1 && chunk.begin == begin &&
                               chunk.end - chunk.begin == capacity &&
                               reinterpret_cast<uintptr_t>(target) % alignment_ == 0;
    if (fits_in_place) {
        read_fully(descriptor_.number(), path_, request, target);
        if (landed) landed(pieces.front().slot_offset, pieces.front().slot_offset + capacity);
        return;
    }
    check_room(capacity, bounce);
    read_fully(descriptor_.number(), path_, request, bounce.data());
    for (const Piece& piece : pieces) {
        in_steps(piece, landed, [&](uint64_t from, uint64_t nbytes) {
            const auto bytes = bounce.subspan(piece.file_offset - begin + from, nbytes);
            place(bytes, piece.slot_offset + from, transposes, slot);
        });
    }
}

void SourceFile::read_buffered(const Chunk& chunk, std::span<const Piece> pieces,
                               std::span<const Transpose> transposes, std::byte* slot,
                               std::span<std::byte> bounce, const Landed& landed) const {
    const bool in_steps_too = source_ == nullptr || !source_->whole_segments();
    for (const Piece& piece : pieces) {
        const auto copy = [&](uint64_t from, uint64_t nbytes) {
            const uint64_t at = piece.slot_offset + from;
            if (transposes.empty())
                return read_range(piece.file_offset + from, {slot + at, nbytes});
            check_room(nbytes, bounce);
            read_range(piece.file_offset + from, bounce.first(nbytes));
            place(bounce.first(nbytes), at, transposes, slot);
        };
        if (in_steps_too) {
            in_steps(piece, landed, copy);
        } else {
            copy(0, piece.nbytes);
            if (landed) landed(piece.slot_offset, piece.slot_offset + piece.nbytes);
        }
    }
    if (source_ != nullptr) return;
    // The kernel drops whole pages only, so the range is rounded to pages.
    const uint64_t begin = round_down(chunk.begin, kChunkAlignment);
    (void)posix_fadvise(descriptor_.number(), static_cast<off_t>(begin),
                        static_cast<off_t>(round_up(chunk.end, kChunkAlignment) - begin),
                        POSIX_FADV_DONTNEED);
}

void SourceFile::check_room(size_t nbytes, std::span<std::byte> bounce) const {
    if (nbytes <= bounce.size()) return;
    throw Error(ErrorCode::kInvalid, path_ + ": a read of " + number(nbytes) +
                                         " bytes does not fit in a buffer of " +
                                         number(bounce.size()));
}

void SourceFile::read_range(uint64_t offset, std::span<std::byte> out) const {
    if (source_ == nullptr) {
        read_fully(descriptor_.number(), path_, {offset, out.size(), out.size(), 1}, out.data());
        return;
    }
    try {
        source_->read(offset, out);
    } catch (const Error& error) {
        read_error(path_, error.what());
    }
}

void SourceFile::check_unchanged() const {
    if (source_ != nullptr) return;
    const struct stat status = status_of(descriptor_.number(), path_);
    if (static_cast<uint64_t>(status.st_size) != nbytes_) {
        read_error(path_, "changed while open: expected " + number(nbytes_) + " bytes, found " +
                              number(static_cast<uint64_t>(status.st_size)));
    }
    if (status.st_mtim.tv_sec != modified_.tv_sec || status.st_mtim.tv_nsec != modified_.tv_nsec) {
        read_error(path_, "was written to while open");
    }
}

}  // namespace moeinf
