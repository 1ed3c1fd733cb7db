// The experts of one catalog in memory that several processes of a user share: a slot for each
// expert, and a mark for each slot that is filled. Experts are never evicted, because a lease of
// one process cannot hold another one back, and a process that was killed gives no lease back.
//
//   absent --lock()--> locked by one process --mark_filled()--> filled, for good
//      ^                     |
//      +---- unlock(), or the end of the process, however it ends
//
// The memory has no path: the kernel frees it when its last user has ended. A small file in
// /dev/shm, locked while it is read or written, says which processes have it open under which
// descriptor; one more user opens /proc/PID/fd/N of any of them. Lines of processes that have ended
// are dropped. Locks of slots are the kernel's, on bytes of the memory, so none outlives its owner.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "base/ids.h"
#include "layout/catalog.h"
#include "memory/arena.h"
#include "transfer/source_file.h"

namespace moeinf {

class SharedSegment {
public:
    // Joins the memory of that name, or makes it. Throws Error(kInvalid) for a name that cannot be
    // one, and for memory of another checkpoint or version; Error(kUnsupported) for a file of
    // another user in its place, and for experts that only a function knows; Error(kCapacity) if
    // all experts do not fit into the memory that is available.
    SharedSegment(const std::string& name, const Catalog& catalog, int32_t slots_before);
    ~SharedSegment();
    SharedSegment(const SharedSegment&) = delete;
    SharedSegment& operator=(const SharedSegment&) = delete;

    [[nodiscard]] bool filled(ExpertId expert) const noexcept {
        return marks_[index(expert)].load(std::memory_order_acquire) != 0;
    }
    void mark_filled(ExpertId expert) noexcept {
        marks_[index(expert)].store(1, std::memory_order_release);
    }
    // Never waits. False: another process, or another cache of this one, fills the slot. Throws
    // Error(kUnsupported) if the kernel refuses locks.
    [[nodiscard]] bool lock(ExpertId expert) const;
    void unlock(ExpertId expert) const noexcept;

    // Its first `slots_before` slots are the caller's own staging slots, which it need not use.
    [[nodiscard]] std::unique_ptr<Arena> arena() const;

private:
    struct Header;
    void join_or_make(const std::string& name, const Header& wanted);
    void map(int descriptor);

    const std::string list_path_;
    const size_t slots_at_;  // bytes before the first slot
    const size_t nbytes_;
    int descriptor_ = -1;
    std::byte* data_ = nullptr;
    std::atomic<uint8_t>* marks_ = nullptr;
};

}  // namespace moeinf
