// Arenas and slot pools: what is promised about addresses, bytes and memory given back.
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/sizes.h"
#include "check.h"
#include "memory/arena.h"
#include "memory/available.h"
#include "memory/slot_pool.h"
#include "scratch.h"

using namespace moeinf;

namespace {

template <typename Function>
std::string message_of(ErrorCode code, Function function) {
    try {
        function();
    } catch (const Error& error) {
        CHECK(error.code() == code);
        return error.what();
    }
    CHECK(!"an error was expected");
    return {};
}

bool contains(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
}

// Whether the system could read that byte for us: false instead of a crash where it may not be.
bool readable(const std::byte* address) {
    int ends[2];
    if (pipe(ends) != 0) return false;
    const bool copied = write(ends[1], address, 1) == 1;
    close(ends[0]);
    close(ends[1]);
    return copied;
}

size_t resident_pages(const std::byte* data, size_t nbytes) {
    std::vector<unsigned char> present(nbytes / kPage);
    if (mincore(const_cast<std::byte*>(data), nbytes, present.data()) != 0) return SIZE_MAX;
    size_t count = 0;
    for (const unsigned char page : present) count += page & 1;
    return count;
}

TEST("only the committed prefix may be touched") {
    const auto arena = make_host_arena(10 * kPage + 1);
    CHECK_EQ(arena->committed(), size_t{0});
    CHECK_EQ(arena->reserved(), 10 * kPage + 1);
    CHECK(!readable(arena->data()));
    arena->commit(3 * kPage);
    CHECK(readable(arena->data() + 3 * kPage - 1));
    CHECK(!readable(arena->data() + 3 * kPage));
    arena->commit(10 * kPage + 1);
    CHECK(readable(arena->data() + 10 * kPage));
    arena->commit(kPage);
    CHECK(readable(arena->data()));
    CHECK(!readable(arena->data() + kPage));
    arena->commit(0);
    CHECK(!readable(arena->data()));
}

TEST("growing takes no memory and shrinking gives it back") {
    constexpr size_t kBytes = size_t{64} << 20;
    const auto arena = make_host_arena(kBytes);
    arena->commit(kBytes);
    CHECK_EQ(resident_pages(arena->data(), kBytes), size_t{0});
    std::memset(arena->data(), 7, kBytes);
    CHECK_EQ(resident_pages(arena->data(), kBytes), kBytes / kPage);
    arena->commit(kPage);
    CHECK_EQ(resident_pages(arena->data(), kBytes), size_t{1});
    CHECK(arena->data()[kPage - 1] == std::byte{7});
    arena->commit(kBytes);
    CHECK_EQ(resident_pages(arena->data(), kBytes), size_t{1});
    CHECK(arena->data()[kPage] == std::byte{0});
}

TEST("what cannot be had is refused and changes nothing") {
    const size_t too_much = 2 * available_memory() / kPage * kPage;
    const auto arena = make_host_arena(too_much);
    arena->commit(2 * kPage);
    arena->data()[0] = std::byte{5};
    const std::string refused = message_of(ErrorCode::kCapacity, [&] { arena->commit(too_much); });
    CHECK(contains(refused, "bytes of memory are available"));
    CHECK_EQ(arena->committed(), 2 * kPage);
    CHECK(arena->data()[0] == std::byte{5});
    CHECK(!readable(arena->data() + 2 * kPage));

    (void)message_of(ErrorCode::kCapacity, [&] { arena->commit(too_much + 1); });
    (void)message_of(ErrorCode::kCapacity, [] { (void)make_host_arena(size_t{1} << 60); });
    (void)message_of(ErrorCode::kInvalid, [] { (void)make_host_arena(0); });
    (void)message_of(ErrorCode::kInvalid, [] { (void)make_host_arena(SIZE_MAX); });
}

// The bytes of writable private memory that the system counts against RLIMIT_DATA.
size_t data_bytes() {
    std::ifstream status("/proc/self/status");
    std::string key;
    while (status >> key) {
        if (key == "VmData:") {
            size_t kib = 0;
            status >> kib;
            return kib << 10;
        }
    }
    return 0;
}

TEST("a limit of the system is an error too") {
    constexpr size_t kBytes = size_t{1} << 30;
    const auto arena = make_host_arena(kBytes);
    rlimit before{};
    CHECK_EQ(getrlimit(RLIMIT_DATA, &before), 0);
    rlimit tight = before;
    tight.rlim_cur = data_bytes() + kBytes / 2;
    CHECK_EQ(setrlimit(RLIMIT_DATA, &tight), 0);
    std::string refused;
    try {
        arena->commit(kBytes);
    } catch (const Error& error) {
        refused = error.what();
    }
    CHECK_EQ(setrlimit(RLIMIT_DATA, &before), 0);
    CHECK(contains(refused, "Cannot allocate memory"));
    CHECK_EQ(arena->committed(), size_t{0});
    arena->commit(kBytes);
    CHECK_EQ(arena->committed(), kBytes);
}

TEST("slots lie side by side and stay where they are") {
    constexpr uint64_t kSlot = 3 * kPage;
    SlotPool pool(make_host_arena(kSlot * 4), kSlot, 4, 2);
    std::byte* const first = pool.slot(SlotId{0});
    CHECK(first == pool.data());
    CHECK(pool.slot(SlotId{1}) == first + kSlot);
    std::memset(pool.slot(SlotId{0}), 1, kSlot);
    std::memset(pool.slot(SlotId{1}), 2, kSlot);
    CHECK(!readable(pool.slot(SlotId{2})));
    pool.resize(4);
    CHECK_EQ(pool.slots(), 4);
    CHECK(readable(pool.slot(SlotId{3}) + kSlot - 1));
    pool.resize(1);
    CHECK(pool.slot(SlotId{0}) == first);
    CHECK(first[kSlot - 1] == std::byte{1});
    CHECK(!readable(pool.slot(SlotId{1})));
    CHECK(contains(message_of(ErrorCode::kCapacity, [&] { pool.resize(5); }),
                   "at most 4 slots cannot have 5"));
    (void)message_of(ErrorCode::kInvalid, [&] { pool.resize(-1); });
    CHECK_EQ(pool.slots(), 1);
}

TEST("a pool keeps the memory of slots that go while a view of them lives") {
    SlotPool pool(make_host_arena(kPage * 4), kPage, 4, 4);
    std::memset(pool.data(), 7, 4 * kPage);
    CHECK_EQ(pool.begin_view(), 4);
    pool.resize(1);
    CHECK_EQ(pool.slots(), 1);
    CHECK_EQ(pool.begin_view(), 4);
    pool.resize(2);
    pool.end_view();
    CHECK(pool.slot(SlotId{3})[kPage - 1] == std::byte{7});
    pool.end_view();
    CHECK(readable(pool.slot(SlotId{1})));
    CHECK(!readable(pool.slot(SlotId{2})));
    CHECK(pool.slot(SlotId{1})[0] == std::byte{7});
    CHECK_EQ(pool.begin_view(), 2);
    pool.resize(3);
    pool.end_view();
    CHECK(readable(pool.slot(SlotId{2})));
    CHECK_EQ(pool.slots(), 3);
}

TEST("pools that do not fit their arena are refused") {
    const auto pool = [](uint64_t slot_bytes, int32_t capacity, int32_t slots) {
        return [=] { SlotPool(make_host_arena(8 * kPage), slot_bytes, capacity, slots); };
    };
    (void)message_of(ErrorCode::kInvalid, pool(0, 1, 1));
    (void)message_of(ErrorCode::kInvalid, pool(kPage + 1, 1, 1));
    (void)message_of(ErrorCode::kInvalid, pool(kPage, 9, 1));
    (void)message_of(ErrorCode::kInvalid, pool(uint64_t{1} << 63, 2, 1));
    (void)message_of(ErrorCode::kInvalid, pool(kPage, -1, 0));
    (void)message_of(ErrorCode::kCapacity, pool(kPage, 2, 3));
    (void)message_of(ErrorCode::kInvalid, [] { SlotPool(nullptr, kPage, 1, 1); });
}

TEST("some memory is available") {
    CHECK(available_memory() > 0);
    CHECK(available_memory() <= system_memory("/proc", "/sys/fs/cgroup"));
}

TEST("what an arena has promised is not available, whether it is touched or not") {
    constexpr size_t kBytes = 256 * kPage;
    const uint64_t before = promised_memory();
    const auto arena = make_host_arena(kBytes);
    CHECK_EQ(promised_memory(), before);
    arena->commit(kBytes);
    CHECK_EQ(promised_memory(), before + kBytes);
    std::memset(arena->data(), 1, kBytes);
    CHECK_EQ(promised_memory(), before);
    arena->commit(0);
    arena->commit(kBytes);
    CHECK_EQ(promised_memory(), before + kBytes);
}

// A /proc and a /sys/fs/cgroup of files.
class FakeSystem {
public:
    void write(const std::string& name, const std::string& text) const {
        const std::filesystem::path path = folder_.path(name);
        std::filesystem::create_directories(path.parent_path());
        std::ofstream(path) << text;
    }
    [[nodiscard]] uint64_t memory() const {
        return system_memory(folder_.path("proc"), folder_.path("sys"));
    }

private:
    ScratchFolder folder_;
};

TEST("memory without control groups: what the kernel calls available, and no swap") {
    const FakeSystem system;
    CHECK_EQ(system.memory(), UINT64_MAX);
    system.write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 5000 kB\nSwapFree: 7000 kB\n");
    CHECK_EQ(system.memory(), 5000u * 1024);
}

TEST("memory in nested groups of version 2: the lowest of max and high counts, less file pages") {
    const FakeSystem system;
    system.write("proc/meminfo", "MemAvailable: 5000 kB\n");
    system.write("proc/self/cgroup", "0::/outer/inner\n");
    system.write("sys/outer/inner/memory.max", "max\n");
    system.write("sys/outer/inner/memory.current", "1000\n");
    CHECK_EQ(system.memory(), 5000u * 1024);
    system.write("sys/outer/memory.max", "90000\n");
    system.write("sys/outer/memory.current", "50000\n");
    system.write("sys/outer/memory.stat", "anon 4\nactive_file 7000\ninactive_file 3000\n");
    CHECK_EQ(system.memory(), 90000u - 50000 + 10000);
    system.write("sys/outer/memory.high", "60000\n");
    CHECK_EQ(system.memory(), 60000u - 50000 + 10000);
    system.write("sys/outer/inner/memory.high", "800\n");
    CHECK_EQ(system.memory(), 0u);
}

TEST("memory in groups of version 1, also where the container's own group is mounted as root") {
    const FakeSystem system;
    system.write("proc/meminfo", "MemAvailable: 5000 kB\n");
    system.write("proc/self/cgroup", "5:cpu,memory:/docker/abc\n1:name=systemd:/\n0::/\n");
    system.write("sys/memory/memory.limit_in_bytes", "9223372036854771712\n");
    system.write("sys/memory/memory.usage_in_bytes", "4000000\n");
    CHECK_EQ(system.memory(), 5000u * 1024);
    system.write("sys/memory/memory.limit_in_bytes", "4100000\n");
    system.write("sys/memory/memory.stat", "inactive_file 9\ntotal_inactive_file 300\n");
    CHECK_EQ(system.memory(), 100300u);
    system.write("sys/memory/docker/abc/memory.limit_in_bytes", "500\n");
    system.write("sys/memory/docker/abc/memory.usage_in_bytes", "100\n");
    CHECK_EQ(system.memory(), 400u);
}

TEST("files of control groups that hold no numbers are as if they were not there") {
    const FakeSystem system;
    system.write("proc/meminfo", "MemAvailable: 5000 kB\n");
    system.write("proc/self/cgroup", "nonsense\n::\n0::/a\n");
    system.write("sys/a/memory.max", "much\n");
    system.write("sys/a/memory.current", "\n");
    CHECK_EQ(system.memory(), 5000u * 1024);
}

}  // namespace

int main(int argc, char** argv) {
    return run_tests(argc, argv);
}
