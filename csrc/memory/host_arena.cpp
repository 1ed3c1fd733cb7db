// An arena of RAM: a range of addresses is reserved once, and commit() makes its first part
// accessible.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <string>
#include <unordered_set>
#include <vector>

#include "base/error.h"
#include "base/sizes.h"
#include "memory/arena.h"
#include "memory/available.h"

namespace moeinf {
namespace {

[[noreturn]] void out_of_memory(const std::string& what, size_t nbytes) {
    throw Error(ErrorCode::kCapacity,
                "cannot " + what + " " + std::to_string(nbytes) + " bytes: " + strerror(errno));
}

class HostArena;

// Every arena of this process, for promised_memory().
struct Arenas {
    std::mutex mutex;
    std::unordered_set<const HostArena*> all;
};

Arenas& arenas() {
    static Arenas* const kept = new Arenas;  // outlives arenas that end after main()
    return *kept;
}

class HostArena final : public Arena {
public:
    explicit HostArena(size_t nbytes) : reserved_(nbytes) {
        if (nbytes == 0 || nbytes > std::numeric_limits<size_t>::max() - 2 * kHugePage) {
            throw Error(
                ErrorCode::kInvalid,
                "expected an arena of at least 1 byte and within the address space, found " +
                    std::to_string(nbytes) + " bytes");
        }
        // One huge page more, so the arena can begin at a huge page.
        mapped_bytes_ = round_up(nbytes, kHugePage) + kHugePage;
        mapped_ = mmap(nullptr, mapped_bytes_, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped_ == MAP_FAILED) out_of_memory("reserve an address range of", nbytes);
        data_ =
            reinterpret_cast<std::byte*>(round_up(reinterpret_cast<uintptr_t>(mapped_), kHugePage));
        // The kernel may have no huge pages. Small pages do the same work.
        (void)madvise(data_, round_up(nbytes, kHugePage), MADV_HUGEPAGE);
        const std::lock_guard lock(arenas().mutex);
        arenas().all.insert(this);
    }

    ~HostArena() override {
        const std::lock_guard lock(arenas().mutex);
        arenas().all.erase(this);
        munmap(mapped_, mapped_bytes_);
    }

    HostArena(const HostArena&) = delete;
    HostArena& operator=(const HostArena&) = delete;

    std::byte* data() const noexcept override { return data_; }
    size_t reserved() const noexcept override { return reserved_; }
    size_t committed() const noexcept override { return committed_; }

    void commit(size_t nbytes) override {
        check_fits(nbytes, reserved_);
        const size_t wanted = round_up(nbytes, kPage);
        const size_t present = round_up(committed_, kPage);
        if (wanted > present) grow(present, wanted);
        if (wanted < present) shrink(wanted, present);
        committed_ = nbytes;
    }

    // Bytes of committed pages that have no memory so far.
    uint64_t promised() const {
        const size_t nbytes = round_up(committed_, kPage);
        std::vector<unsigned char> present(kPagesAtOnce);
        uint64_t pages = 0;
        for (size_t from = 0; from < nbytes; from += kPagesAtOnce * kPage) {
            const size_t length = std::min(kPagesAtOnce * kPage, nbytes - from);
            if (mincore(data_ + from, length, present.data()) != 0) return pages * kPage;
            pages += static_cast<uint64_t>(
                std::count_if(present.begin(), present.begin() + length / kPage,
                              [](unsigned char page) { return (page & 1) == 0; }));
        }
        return pages * kPage;
    }

private:
    static constexpr size_t kPagesAtOnce = size_t{1} << 18;

    void grow(size_t from, size_t to) {
        const uint64_t available = available_memory();
        if (to - from > available) {
            throw Error(ErrorCode::kCapacity, "cannot grow an arena from " + std::to_string(from) +
                                                  " to " + std::to_string(to) +
                                                  " bytes: " + std::to_string(available) +
                                                  " bytes of memory are available");
        }
        if (mprotect(data_ + from, to - from, PROT_READ | PROT_WRITE) != 0) {
            out_of_memory("grow an arena by", to - from);
        }
    }

    void shrink(size_t to, size_t from) {
        // Releases the pages first, so no memory stays in use if mprotect fails.
        if (madvise(data_ + to, from - to, MADV_DONTNEED) != 0 ||
            mprotect(data_ + to, from - to, PROT_NONE) != 0) {
            out_of_memory("give back", from - to);
        }
    }

    size_t reserved_;
    std::atomic<size_t> committed_ = 0;
    size_t mapped_bytes_ = 0;
    void* mapped_ = nullptr;
    std::byte* data_ = nullptr;
};

}  // namespace

void check_fits(size_t nbytes, size_t reserved) {
    if (nbytes > reserved) {
        throw Error(ErrorCode::kCapacity, "an arena of " + std::to_string(reserved) +
                                              " reserved bytes cannot hold " +
                                              std::to_string(nbytes));
    }
}

uint64_t promised_memory() {
    const std::lock_guard lock(arenas().mutex);
    uint64_t nbytes = 0;
    for (const HostArena* arena : arenas().all) nbytes += arena->promised();
    return nbytes;
}

std::unique_ptr<Arena> make_host_arena(size_t reserve_bytes) {
    return std::make_unique<HostArena>(reserve_bytes);
}

}  // namespace moeinf
