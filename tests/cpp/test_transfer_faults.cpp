// The file reader with files that are missing, changed or unreadable.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "expert_files.h"
#include "transfer/file_reader.h"
#include "transfer/source_file.h"

using namespace moeinf;

namespace {

// The engine's own descriptor of a file, found among those of this process.
int descriptor_of(const std::string& path) {
    for (int number = 3; number < 1000; ++number) {
        char target[4096];
        const std::string link = "/proc/self/fd/" + std::to_string(number);
        const ssize_t length = readlink(link.c_str(), target, sizeof target);
        if (length > 0 && std::string(target, static_cast<size_t>(length)) == path) return number;
    }
    return -1;
}

std::string failure_of(FileReader& engine, ExpertId expert, std::byte* slot) {
    std::atomic<int> calls{0};
    const auto transfer =
        engine.submit(expert, slot, Priority::kDemand, [&](const ReadJobPtr&) { ++calls; });
    while (calls == 0) std::this_thread::yield();
    CHECK(transfer->state() == ReadState::kFailed);
    return transfer->error();
}

bool contains(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
}

// Puts something that refuses to be read where the engine's file was, then puts the file back.
TEST("a read that fails fails its transfer and leaves the engine usable") {
    std::mt19937_64 random(drawn_seed());
    const ExpertFiles world(random, 1, 3, 60'000, 1);
    std::vector slot(world.slot_bytes, kPoison);
    for (const bool direct : {true, false}) {
        FileReader engine(world.catalog, {3, kPage, direct});
        const int descriptor = descriptor_of(world.files[0].path);
        CHECK(descriptor >= 0);
        const int saved = dup(descriptor);
        const int folder = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        CHECK(dup2(folder, descriptor) >= 0);
        const std::string refused = failure_of(engine, ExpertId{0}, slot.data());
        CHECK(contains(refused, world.files[0].path + ": reading "));
        CHECK(contains(refused, "Is a directory"));
        CHECK(dup2(saved, descriptor) >= 0);
        close(saved);
        close(folder);

        std::fill(slot.begin(), slot.end(), kPoison);
        const auto transfer = engine.submit(ExpertId{0}, slot.data(), Priority::kDemand, {});
        wait_until_finished(transfer);
        CHECK(transfer->state() == ReadState::kDone);
        CHECK(slot == world.expected(ExpertId{0}));
    }
}

TEST("nothing is written after a failure was reported") {
    LargeExperts large;
    FileReader engine(large.catalog, {4, 4 * kPage, true});
    std::filesystem::resize_file(large.path, LargeExperts::kBytes / 2);
    std::atomic<int> calls{0};
    const std::vector poison(LargeExperts::kBytes, kPoison);
    const auto transfer = engine.submit(ExpertId{0}, large.slots[0].data(), Priority::kDemand,
                                        [&](const ReadJobPtr&) {
                                            large.slots[0] = poison;
                                            ++calls;
                                        });
    while (calls == 0) std::this_thread::yield();
    CHECK(transfer->state() == ReadState::kFailed);
    CHECK(contains(transfer->error(), large.path));
    CHECK(contains(transfer->error(), std::to_string(2 * LargeExperts::kBytes)) ||
          contains(transfer->error(),
                   "the file ends at " + std::to_string(LargeExperts::kBytes / 2)));
    (void)failure_of(engine, ExpertId{1}, large.slots[1].data());
    CHECK(large.slots[0] == poison);
    CHECK_EQ(calls.load(), 1);
}

TEST("a reading that ends early or fails says where") {
    const auto failure = [](int descriptor, ReadRequest request) -> std::string {
        std::vector<std::byte> out(request.capacity);
        try {
            read_fully(descriptor, "the-file", request, out.data());
        } catch (const Error& error) {
            CHECK(error.code() == ErrorCode::kRead);
            return error.what();
        }
        return {};
    };
    const ScratchFolder folder;
    const std::string path = folder.write("short", std::vector(100, std::byte{1}));
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    CHECK_EQ(failure(file, {40, 60, 60, 1}), std::string());
    CHECK_EQ(failure(file, {0, 100, 512, 512}), std::string());
    CHECK(contains(failure(file, {40, 61, 61, 1}),
                   "expected 61 bytes at offset 40, found 60: the file ends at 100"));
    CHECK(contains(failure(file, {0, 101, 512, 512}), "found 100: the file ends at 100"));
    CHECK(contains(failure(file, {200, 1, 512, 512}), "expected 1 bytes at offset 200, found 0"));
    close(file);
    CHECK(contains(failure(file, {0, 1, 1, 1}), "Bad file descriptor"));
    // A file whose device answers EIO: memory of this process that is not mapped.
    const int memory = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
    CHECK(contains(failure(memory, {4096, 10, 10, 1}), "Input/output error"));
    close(memory);
}

TEST("what cannot be opened is named") {
    const ScratchFolder folder;
    const std::string path = folder.write("present", std::vector(100, std::byte{1}));
    const auto failure = [](const std::string& name, uint64_t nbytes) -> std::string {
        const auto catalog = std::make_shared<const Catalog>(
            ModelShape{1, 1}, 100, std::vector<CatalogFile>{{name, nbytes}},
            std::vector<Extent>{{0, 0, 100, 0}});
        try {
            const FileReader engine(catalog, {});
        } catch (const Error& error) {
            CHECK(error.code() == ErrorCode::kRead);
            return error.what();
        }
        return {};
    };
    CHECK_EQ(failure(path, 100), std::string());
    CHECK(contains(failure(path, 101), path + ": expected a file of 101 bytes, found 100"));
    CHECK(contains(failure(path + "x", 100), path + "x: cannot be opened: No such file"));
    CHECK(contains(failure("/", 100), "/: expected a regular file"));
    CHECK(contains(failure("/dev/null", 100), "/dev/null: expected a regular file"));
}

TEST("settings that cannot work are refused") {
    std::mt19937_64 random(drawn_seed());
    const ExpertFiles world(random, 1, 1, 10, 1);
    for (const FileReaderOptions& options :
         {FileReaderOptions{-1, 0, true}, FileReaderOptions{257, 0, true},
          FileReaderOptions{1, 100, true}, FileReaderOptions{1, size_t{1} << 31, true}}) {
        bool refused = false;
        try {
            const FileReader engine(world.catalog, options);
        } catch (const Error& error) {
            refused = error.code() == ErrorCode::kInvalid;
        }
        CHECK(refused);
    }
    FileReader engine(world.catalog, {});
    std::byte slot{};
    for (const int32_t expert : {-1, 1}) {
        bool refused = false;
        try {
            (void)engine.submit(ExpertId{expert}, &slot, Priority::kDemand, {});
        } catch (const Error& error) {
            refused = error.code() == ErrorCode::kInvalid;
        }
        CHECK(refused);
    }
}

}  // namespace

int main(int argc, char** argv) {
    return run_tests(argc, argv);
}
