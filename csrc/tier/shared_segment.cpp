#include "tier/shared_segment.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <mutex>
#include <sstream>
#include <unordered_set>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/sizes.h"
#include "memory/available.h"

namespace moeinf {
namespace {

constexpr std::array<char, 8> kMagic = {'m', 'o', 'e', 'i', 'n', 'f', 's', 'h'};
constexpr uint64_t kVersion = 1;
constexpr const char* kFolder = "/dev/shm/";

// Descriptors of segments. A forked child closes its copies: locks of the parent would live on in
// them after the parent's end.
struct Descriptors {
    std::mutex mutex;
    std::unordered_set<int> open;
};

Descriptors& descriptors() {
    static auto* const kept = [] {
        static auto* const made = new Descriptors;
        (void)pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); },
                             [] {
                                 for (const int one : made->open) close(one);
                                 made->mutex.unlock();
                             });
        return made;
    }();
    return *kept;
}

[[noreturn]] void unsupported(const std::string& what) {
    throw Error(ErrorCode::kUnsupported, what);
}

std::string reason() {
    return strerror(errno);
}

// Tells experts apart that were confused by mistake, not by an attacker.
class Hash {
public:
    void add(uint64_t word) {
        for (size_t i = 0; i < state_.size(); ++i) {
            state_[i] = (state_[i] ^ word) * kPrimes[i];
            state_[i] ^= state_[i] >> 29;
        }
    }
    void add(const std::string& text) {
        add(text.size());
        for (const char one : text) add(static_cast<uint64_t>(static_cast<unsigned char>(one)));
    }
    [[nodiscard]] std::array<uint64_t, 2> value() const { return state_; }

private:
    static constexpr uint64_t kPrimes[2] = {0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F};
    std::array<uint64_t, 2> state_ = {1, 2};
};

void add_file(Hash& hash, const CatalogFile& file) {
    hash.add(file.nbytes);
    if (file.source == nullptr) {
        struct stat status{};
        if (stat(file.path.c_str(), &status) != 0) {
            throw Error(ErrorCode::kRead, file.path + ": cannot be examined: " + reason());
        }
        hash.add(status.st_dev);
        hash.add(status.st_ino);
        hash.add(static_cast<uint64_t>(status.st_mtim.tv_sec));
        hash.add(static_cast<uint64_t>(status.st_mtim.tv_nsec));
        return;
    }
    if (file.source->whole_segments()) {
        unsupported(file.path +
                    ": experts that a function writes cannot be shared: nothing says "
                    "that another process has the same");
    }
    std::vector<std::byte> part(size_t{1} << 20);
    for (uint64_t at = 0; at < file.nbytes; at += part.size()) {
        const auto count = static_cast<size_t>(std::min<uint64_t>(part.size(), file.nbytes - at));
        file.source->read(at, {part.data(), count});
        for (size_t i = 0; i < count; i += 8) {
            uint64_t word = 0;
            std::memcpy(&word, part.data() + i, std::min<size_t>(8, count - i));
            hash.add(word);
        }
    }
}

std::array<uint64_t, 2> fingerprint(const Catalog& catalog) {
    Hash hash;
    for (const CatalogFile& file : catalog.files()) add_file(hash, file);
    for (const ExpertId expert : catalog.shape().experts()) {
        for (const Extent& one : catalog.extents(expert)) {
            for (const uint64_t word :
                 {uint64_t{one.file}, one.file_offset, one.nbytes, one.slot_offset}) {
                hash.add(word);
            }
        }
    }
    for (const Transpose& one : catalog.transposes()) {
        for (const uint64_t word : {one.slot_offset, one.rows, one.cols, one.element}) {
            hash.add(word);
        }
    }
    for (const Recode& one : catalog.recodes()) {
        for (const uint64_t word : {static_cast<uint64_t>(one.kind), one.slot_offset, one.rows,
                                    one.cols, one.bits, one.plus}) {
            hash.add(word);
        }
    }
    return hash.value();
}

std::string list_path_of(const std::string& name) {
    const bool known = std::all_of(name.begin(), name.end(), [](unsigned char one) {
        return (one >= '0' && one <= '9') || (one >= 'a' && one <= 'z') ||
               (one >= 'A' && one <= 'Z') || one == '-' || one == '_' || one == '.';
    });
    if (name.empty() || name.size() > 64 || !known) {
        throw Error(ErrorCode::kInvalid,
                    "shared: expected a name of 1 to 64 letters, digits, '-', "
                    "'_' and '.', found '" +
                        name + "'");
    }
    return kFolder + ("moeinf-" + std::to_string(geteuid())) + "-" + name;
}

// The list of users, locked.
class UserList {
public:
    struct User {
        pid_t process;
        int descriptor;
    };

    explicit UserList(const std::string& path) : path_(path) {
        for (;;) {
            Descriptor opened(
                open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, S_IRUSR | S_IWUSR));
            if (opened.number() < 0) unsupported(path + ": cannot be opened: " + reason());
            struct stat status{};
            if (fstat(opened.number(), &status) != 0 || !S_ISREG(status.st_mode) ||
                status.st_uid != geteuid() || (status.st_mode & (S_IRWXG | S_IRWXO)) != 0) {
                unsupported(path + ": expected a file that this user alone can read: remove it");
            }
            while (flock(opened.number(), LOCK_EX) != 0) {
                if (errno != EINTR) unsupported(path + ": cannot be locked: " + reason());
            }
            struct stat now{};  // its last user may have removed it before it was locked
            if (stat(path.c_str(), &now) == 0 && now.st_ino == status.st_ino &&
                now.st_dev == status.st_dev) {
                file_.emplace_back(std::move(opened));
                break;
            }
        }
        std::ifstream text(path);
        User one{};
        while (text >> one.process >> one.descriptor) users.push_back(one);
    }

    // With the users that `users` has now; without any the file goes.
    void write() const noexcept {
        if (users.empty()) {
            (void)unlink(path_.c_str());
            return;
        }
        std::string text;
        for (const User& one : users) {
            text += std::to_string(one.process) + " " + std::to_string(one.descriptor) + "\n";
        }
        const int file = file_.front().number();
        if (ftruncate(file, 0) == 0) (void)!pwrite(file, text.data(), text.size(), 0);
    }

    std::vector<User> users;

private:
    const std::string path_;
    std::vector<Descriptor> file_;  // one
};

// The memory that a process of the list has open; -1: it has ended, or never had it.
int open_of(const UserList::User& user, const std::string& memory_name) {
    const std::string path =
        "/proc/" + std::to_string(user.process) + "/fd/" + std::to_string(user.descriptor);
    // First the name: to open anything else could have effects.
    std::array<char, 256> link{};
    const ssize_t length = readlink(path.c_str(), link.data(), link.size() - 1);
    if (length < 0 || link.data() != "/memfd:" + memory_name + " (deleted)") return -1;
    return open(path.c_str(), O_RDWR | O_CLOEXEC);
}

bool set_lock(int descriptor, ExpertId expert, short type) {
    struct flock lock{};
    lock.l_type = type;
    lock.l_whence = SEEK_SET;
    lock.l_start = number(expert);
    lock.l_len = 1;
    return fcntl(descriptor, F_OFD_SETLK, &lock) == 0;
}

class SegmentArena final : public Arena {
public:
    SegmentArena(std::byte* data, size_t nbytes) : data_(data), nbytes_(nbytes) {}
    [[nodiscard]] std::byte* data() const noexcept override { return data_; }
    [[nodiscard]] size_t reserved() const noexcept override { return nbytes_; }
    [[nodiscard]] size_t committed() const noexcept override { return committed_; }
    void commit(size_t nbytes) override {
        check_fits(nbytes, nbytes_);
        committed_ = nbytes;
    }

private:
    std::byte* const data_;
    const size_t nbytes_;
    std::atomic<size_t> committed_ = 0;
};

}  // namespace

struct SharedSegment::Header {
    std::array<char, 8> magic = kMagic;
    uint64_t version = kVersion;
    std::array<uint64_t, 2> fingerprint{};
    uint64_t nbytes = 0;
};
static_assert(std::atomic<uint8_t>::is_always_lock_free);

SharedSegment::SharedSegment(const std::string& name, const Catalog& catalog, int32_t slots_before)
    : list_path_(list_path_of(name)),
      slots_at_(round_up(kPage + static_cast<size_t>(catalog.total_experts()), kHugePage)),
      nbytes_(slots_at_ +
              static_cast<size_t>(catalog.total_experts() + slots_before) * catalog.slot_bytes()) {
    Header wanted;
    wanted.fingerprint = fingerprint(catalog);
    wanted.nbytes = nbytes_;
    join_or_make(name, wanted);
}

void SharedSegment::join_or_make(const std::string& name, const Header& wanted) {
    const std::string memory_name = "moeinf-" + name;
    UserList list(list_path_);
    std::vector<UserList::User> alive;
    for (const UserList::User& user : list.users) {
        const int opened = open_of(user, memory_name);
        if (opened < 0) continue;
        alive.push_back(user);
        if (descriptor_ < 0) {
            descriptor_ = opened;
        } else {
            close(opened);
        }
    }
    list.users = std::move(alive);
    try {
        if (descriptor_ < 0) {
            const uint64_t available = available_memory();
            if (nbytes_ > available) {
                throw Error(ErrorCode::kCapacity, "shared '" + name + "': all experts take " +
                                                      std::to_string(nbytes_) + " bytes, " +
                                                      std::to_string(available) + " are available");
            }
            descriptor_ = memfd_create(memory_name.c_str(), MFD_CLOEXEC);
            if (descriptor_ < 0 || fchmod(descriptor_, S_IRUSR | S_IWUSR) != 0 ||
                ftruncate(descriptor_, static_cast<off_t>(nbytes_)) != 0 ||
                pwrite(descriptor_, &wanted, sizeof wanted, 0) != sizeof wanted) {
                throw Error(ErrorCode::kCapacity,
                            "shared '" + name + "': memory cannot be had: " + reason());
            }
        }
        Header found{};
        if (pread(descriptor_, &found, sizeof found, 0) != sizeof found ||
            found.magic != wanted.magic || found.version != wanted.version) {
            throw Error(ErrorCode::kInvalid,
                        "shared '" + name +
                            "': a program with another version of moeinf uses it: "
                            "end that program, or give another name");
        }
        if (found.fingerprint != wanted.fingerprint || found.nbytes != wanted.nbytes) {
            throw Error(ErrorCode::kInvalid,
                        "shared '" + name +
                            "': it has the experts of another checkpoint, or of "
                            "these files before they were changed: give another name");
        }
        void* const mapped =
            mmap(nullptr, nbytes_, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor_, 0);
        if (mapped == MAP_FAILED) {
            throw Error(ErrorCode::kCapacity,
                        "shared '" + name + "': memory cannot be mapped: " + reason());
        }
        data_ = static_cast<std::byte*>(mapped);
    } catch (...) {
        if (descriptor_ >= 0) close(descriptor_);
        list.write();
        throw;
    }
    // The kernel may have no huge pages for shared memory. Small pages do the same work.
    (void)madvise(data_ + slots_at_, nbytes_ - slots_at_, MADV_HUGEPAGE);
    marks_ = reinterpret_cast<std::atomic<uint8_t>*>(data_ + kPage);
    {
        const std::lock_guard lock(descriptors().mutex);
        descriptors().open.insert(descriptor_);
    }
    list.users.push_back({getpid(), descriptor_});
    list.write();
}

SharedSegment::~SharedSegment() {
    try {
        UserList list(list_path_);
        std::erase_if(list.users, [&](const UserList::User& one) {
            return one.process == getpid() && one.descriptor == descriptor_;
        });
        list.write();
    } catch (const std::exception&) {  // the next user drops the line
    }
    const std::lock_guard lock(descriptors().mutex);
    descriptors().open.erase(descriptor_);
    munmap(data_, nbytes_);
    close(descriptor_);
}

bool SharedSegment::lock(ExpertId expert) const {
    if (set_lock(descriptor_, expert, F_WRLCK)) return true;
    if (errno == EAGAIN || errno == EACCES) return false;
    unsupported("shared memory cannot be locked: " + reason());
}

void SharedSegment::unlock(ExpertId expert) const noexcept {
    (void)set_lock(descriptor_, expert, F_UNLCK);
}

std::unique_ptr<Arena> SharedSegment::arena() const {
    return std::make_unique<SegmentArena>(data_ + slots_at_, nbytes_ - slots_at_);
}

}  // namespace moeinf
