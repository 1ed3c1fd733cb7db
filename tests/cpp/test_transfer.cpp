// The copy engine: every byte in its place, demand first, and every fault reported once.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <latch>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "layout/catalog.h"
#include "scratch.h"
#include "transfer/copy_engine.h"
#include "transfer/source_file.h"

using namespace moeinf;

namespace {

constexpr size_t kPage = 4096;
constexpr std::byte kPoison{0xA5};

// Experts scattered over files, with the bytes that each slot must end up with.
struct World {
    ScratchFolder folder;
    std::vector<std::vector<std::byte>> contents;
    std::vector<CatalogFile> files;
    std::vector<Extent> extents;
    size_t slot_bytes = 0;
    size_t per_expert = 0;
    std::shared_ptr<const Catalog> catalog;

    // Segment sizes are drawn up to `largest`; gaps in files and slots are drawn too.
    World(std::mt19937_64& random, int32_t experts, size_t segments, size_t largest,
          size_t num_files) {
        per_expert = segments;
        const auto draw = [&](size_t below) { return static_cast<size_t>(random() % below); };
        std::vector<size_t> sizes(segments), places(segments);
        for (size_t i = 0; i < segments; ++i) {
            sizes[i] = 1 + draw(largest);
            slot_bytes += draw(70);
            places[i] = slot_bytes;
            slot_bytes += sizes[i];
        }
        slot_bytes += draw(kPage);
        contents.resize(num_files);
        const auto pad = [&](std::vector<std::byte>& content, size_t count) {
            const auto bytes = random_bytes(count, random);
            content.insert(content.end(), bytes.begin(), bytes.end());
        };
        for (int32_t expert = 0; expert < experts; ++expert) {
            std::vector<size_t> order(segments);
            std::iota(order.begin(), order.end(), 0);
            std::shuffle(order.begin(), order.end(), random);
            std::vector<Extent> own(segments);
            for (const size_t i : order) {
                const size_t file = draw(num_files);
                // Side by side, nearly so, or far apart.
                pad(contents[file], std::vector<size_t>{0, draw(200), draw(100'000)}[draw(3)]);
                own[i] = {static_cast<uint32_t>(file), contents[file].size(), sizes[i], places[i]};
                pad(contents[file], sizes[i]);
            }
            extents.insert(extents.end(), own.begin(), own.end());
        }
        for (size_t i = 0; i < num_files; ++i) {
            const std::string path = folder.write("file-" + std::to_string(i), contents[i]);
            files.push_back({path, contents[i].size()});
        }
        catalog = std::make_shared<const Catalog>(1, experts, slot_bytes, files, extents);
    }

    [[nodiscard]] std::vector<std::byte> expected(int32_t expert) const {
        std::vector<std::byte> slot(slot_bytes, kPoison);
        for (size_t i = 0; i < per_expert; ++i) {
            const Extent& extent = extents[static_cast<size_t>(expert) * per_expert + i];
            std::memcpy(slot.data() + extent.slot_offset,
                        contents[extent.file].data() + extent.file_offset, extent.nbytes);
        }
        return slot;
    }
};

void wait_until_finished(const TransferPtr& transfer) {
    while (transfer->state() <= TransferState::kRunning) std::this_thread::yield();
}

// Who finished, in order. Callbacks may come from any thread.
class Order {
public:
    TransferCallback note() {
        return [this](const TransferPtr& transfer) {
            const std::lock_guard guard(lock_);
            experts_.push_back(transfer->expert());
        };
    }
    std::vector<int32_t> experts() {
        const std::lock_guard guard(lock_);
        return experts_;
    }

private:
    std::mutex lock_;
    std::vector<int32_t> experts_;
};

// Holds the engine's only worker inside a callback until opened.
class Gate {
public:
    Gate(CopyEngine& engine, int32_t expert, std::byte* slot) {
        transfer_ = engine.submit(expert, slot, Priority::kDemand, [this](const TransferPtr&) {
            entered_.count_down();
            open_.wait();
        });
        entered_.wait();
    }
    void open() { open_.count_down(); }

private:
    std::latch entered_{1};
    std::latch open_{1};
    TransferPtr transfer_;
};

void every_byte_lands_in_its_place(std::mt19937_64& random) {
    for (int round = 0; round < 12; ++round) {
        const size_t largest = std::vector<size_t>{3, 600, 40'000, 300'000}[random() % 4];
        const World world(random, 6, 1 + random() % 5, largest, 1 + random() % 3);
        CopyEngineOptions options;
        options.threads = static_cast<int32_t>(1 + random() % 4);
        options.chunk_bytes = kPage * (1 + random() % 40);
        options.direct = random() % 4 != 0;
        std::vector<std::vector<std::byte>> slots(12, std::vector(world.slot_bytes, kPoison));
        std::vector<TransferPtr> transfers;
        {
            CopyEngine engine(world.catalog, options);
            for (int32_t i = 0; i < 12; ++i) {
                const Priority priority = random() % 2 ? Priority::kDemand : Priority::kPrefetch;
                transfers.push_back(
                    engine.submit(i % 6, slots[static_cast<size_t>(i)].data(), priority, {}));
            }
            for (const TransferPtr& transfer : transfers) wait_until_finished(transfer);
        }
        for (int32_t i = 0; i < 12; ++i) {
            CHECK(transfers[static_cast<size_t>(i)]->state() == TransferState::kDone);
            CHECK(slots[static_cast<size_t>(i)] == world.expected(i % 6));
        }
    }
}

void demands_go_before_prefetches_and_promotion_makes_one(std::mt19937_64& random) {
    const World world(random, 6, 2, 5'000, 1);
    std::vector slots(6, std::vector(world.slot_bytes, kPoison));
    Order order;
    {
        CopyEngine engine(world.catalog, {1, kPage, true});
        Gate gate(engine, 0, slots[0].data());
        const auto submit = [&](int32_t expert, Priority priority) {
            return engine.submit(expert, slots[static_cast<size_t>(expert)].data(), priority,
                                 order.note());
        };
        const auto first = submit(1, Priority::kPrefetch);
        const auto promoted = submit(2, Priority::kPrefetch);
        const auto last = submit(3, Priority::kPrefetch);
        const auto demand = submit(4, Priority::kDemand);
        engine.promote(promoted);
        engine.promote(promoted);  // no effect on what is a demand already
        const auto late = submit(5, Priority::kDemand);
        gate.open();
        for (const auto& transfer : {first, promoted, last, demand, late}) {
            wait_until_finished(transfer);
        }
        engine.promote(first);  // nor on what is over
    }
    CHECK(order.experts() == (std::vector<int32_t>{4, 2, 5, 1, 3}));
}

// Two experts of many chunks each, in files that take no space on the disk.
struct Large {
    static constexpr uint64_t kBytes = uint64_t{16} << 20;
    ScratchFolder folder;
    std::vector<std::byte> slots[2] = {std::vector(kBytes, kPoison), std::vector(kBytes, kPoison)};
    std::string path = folder.write("large", {});
    std::shared_ptr<const Catalog> catalog;

    Large() {
        std::filesystem::resize_file(path, 2 * kBytes);
        catalog = std::make_shared<const Catalog>(
            1, 2, kBytes, std::vector<CatalogFile>{{path, 2 * kBytes}},
            std::vector<Extent>{{0, 0, kBytes, 0}, {0, kBytes, kBytes, 0}});
    }
};

// With one worker, a demand that ends before a prefetch which ran already when it was submitted
// must have been taken up between two chunks of it. A stalled test may submit too late, so it tries
// again; an engine that finishes what it began would fail every time.
void a_demand_overtakes_a_running_prefetch_at_the_next_chunk() {
    bool overtook = false;
    for (int attempt = 0; attempt < 50 && !overtook; ++attempt) {
        Large large;
        Order order;
        CopyEngine engine(large.catalog, {1, kPage, true});
        const auto prefetch =
            engine.submit(0, large.slots[0].data(), Priority::kPrefetch, order.note());
        while (prefetch->state() == TransferState::kQueued) std::this_thread::yield();
        CHECK(!engine.cancel(prefetch));
        const auto demand =
            engine.submit(1, large.slots[1].data(), Priority::kDemand, order.note());
        wait_until_finished(demand);
        wait_until_finished(prefetch);
        while (order.experts().size() < 2) std::this_thread::yield();
        overtook = order.experts() == std::vector<int32_t>{1, 0};
    }
    CHECK(overtook);
}

void what_is_cancelled_never_touches_its_slot(std::mt19937_64& random) {
    const World world(random, 3, 3, 9'000, 2);
    const std::vector untouched(world.slot_bytes, kPoison);
    std::vector slots(3, untouched);
    std::atomic<int> calls{0};
    {
        CopyEngine engine(world.catalog, {1, kPage, true});
        Gate gate(engine, 0, slots[0].data());
        const auto cancelled = engine.submit(
            1, slots[1].data(), Priority::kPrefetch, [&](const TransferPtr& transfer) {
                CHECK(transfer->state() == TransferState::kCancelled);
                ++calls;
            });
        const auto kept = engine.submit(2, slots[2].data(), Priority::kPrefetch, {});
        CHECK(engine.cancel(cancelled));
        CHECK_EQ(calls.load(), 1);
        CHECK(!engine.cancel(cancelled));
        gate.open();
        wait_until_finished(kept);
        CHECK(!engine.cancel(kept));
    }
    CHECK_EQ(calls.load(), 1);
    CHECK(slots[1] == untouched);
    CHECK(slots[2] == world.expected(2));
}

void the_destructor_cancels_what_waits_and_ends_what_runs(std::mt19937_64& random) {
    const World world(random, 4, 2, 9'000, 1);
    const std::vector untouched(world.slot_bytes, kPoison);
    std::vector slots(4, untouched);
    std::atomic<int> cancelled{0};
    auto engine = std::make_unique<CopyEngine>(world.catalog, CopyEngineOptions{1, kPage, true});
    Gate gate(*engine, 0, slots[0].data());
    for (const int32_t expert : {1, 2, 3}) {
        (void)engine->submit(expert, slots[static_cast<size_t>(expert)].data(),
                             expert == 1 ? Priority::kDemand : Priority::kPrefetch,
                             [&](const TransferPtr& transfer) {
                                 cancelled += transfer->state() == TransferState::kCancelled;
                             });
    }
    std::jthread destroyer([&] { engine.reset(); });
    while (cancelled < 3) std::this_thread::yield();
    gate.open();
    destroyer.join();
    CHECK_EQ(cancelled.load(), 3);
    CHECK(slots[0] == world.expected(0));
    for (const size_t i : {1, 2, 3}) CHECK(slots[i] == untouched);
}

void a_running_transfer_stops_with_its_engine() {
    Large large;
    std::atomic<int> calls{0};
    TransferPtr transfer;
    {
        CopyEngine engine(large.catalog, {2, kPage, true});
        transfer = engine.submit(0, large.slots[0].data(), Priority::kDemand,
                                 [&](const TransferPtr&) { ++calls; });
        while (transfer->state() == TransferState::kQueued) std::this_thread::yield();
    }
    CHECK_EQ(calls.load(), 1);
    CHECK(transfer->state() >= TransferState::kDone);
    CHECK(transfer->state() != TransferState::kFailed);
}

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

std::string failure_of(CopyEngine& engine, int32_t expert, std::byte* slot) {
    std::atomic<int> calls{0};
    const auto transfer =
        engine.submit(expert, slot, Priority::kDemand, [&](const TransferPtr&) { ++calls; });
    while (calls == 0) std::this_thread::yield();
    CHECK(transfer->state() == TransferState::kFailed);
    return transfer->error();
}

bool contains(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
}

// Puts something that refuses to be read where the engine's file was, then puts the file back.
void a_read_that_fails_fails_its_transfer_and_leaves_the_engine_usable(std::mt19937_64& random) {
    const World world(random, 1, 3, 60'000, 1);
    std::vector slot(world.slot_bytes, kPoison);
    for (const bool direct : {true, false}) {
        CopyEngine engine(world.catalog, {3, kPage, direct});
        const int descriptor = descriptor_of(world.files[0].path);
        CHECK(descriptor >= 0);
        const int saved = dup(descriptor);
        const int folder = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        CHECK(dup2(folder, descriptor) >= 0);
        const std::string refused = failure_of(engine, 0, slot.data());
        CHECK(contains(refused, world.files[0].path + ": reading "));
        CHECK(contains(refused, "Is a directory"));
        CHECK(dup2(saved, descriptor) >= 0);
        close(saved);
        close(folder);

        std::fill(slot.begin(), slot.end(), kPoison);
        const auto transfer = engine.submit(0, slot.data(), Priority::kDemand, {});
        wait_until_finished(transfer);
        CHECK(transfer->state() == TransferState::kDone);
        CHECK(slot == world.expected(0));
    }
}

void nothing_is_written_after_a_failure_was_reported() {
    Large large;
    CopyEngine engine(large.catalog, {4, 4 * kPage, true});
    std::filesystem::resize_file(large.path, Large::kBytes / 2);
    std::atomic<int> calls{0};
    const std::vector poison(Large::kBytes, kPoison);
    const auto transfer =
        engine.submit(0, large.slots[0].data(), Priority::kDemand, [&](const TransferPtr&) {
            large.slots[0] = poison;
            ++calls;
        });
    while (calls == 0) std::this_thread::yield();
    CHECK(transfer->state() == TransferState::kFailed);
    CHECK(contains(transfer->error(), large.path));
    CHECK(contains(transfer->error(), std::to_string(2 * Large::kBytes)) ||
          contains(transfer->error(), "the file ends at " + std::to_string(Large::kBytes / 2)));
    (void)failure_of(engine, 1, large.slots[1].data());
    CHECK(large.slots[0] == poison);
    CHECK_EQ(calls.load(), 1);
}

void a_reading_that_ends_early_or_fails_says_where() {
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

void what_cannot_be_opened_is_named() {
    const ScratchFolder folder;
    const std::string path = folder.write("present", std::vector(100, std::byte{1}));
    const auto failure = [](const std::string& name, uint64_t nbytes) -> std::string {
        const auto catalog =
            std::make_shared<const Catalog>(1, 1, 100, std::vector<CatalogFile>{{name, nbytes}},
                                            std::vector<Extent>{{0, 0, 100, 0}});
        try {
            const CopyEngine engine(catalog, {});
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

void settings_that_cannot_work_are_refused(std::mt19937_64& random) {
    const World world(random, 1, 1, 10, 1);
    for (const CopyEngineOptions& options :
         {CopyEngineOptions{-1, 0, true}, CopyEngineOptions{257, 0, true},
          CopyEngineOptions{1, 100, true}, CopyEngineOptions{1, size_t{1} << 31, true}}) {
        bool refused = false;
        try {
            const CopyEngine engine(world.catalog, options);
        } catch (const Error& error) {
            refused = error.code() == ErrorCode::kInvalid;
        }
        CHECK(refused);
    }
    CopyEngine engine(world.catalog, {});
    std::byte slot{};
    for (const int32_t expert : {-1, 1}) {
        bool refused = false;
        try {
            (void)engine.submit(expert, &slot, Priority::kDemand, {});
        } catch (const Error& error) {
            refused = error.code() == ErrorCode::kInvalid;
        }
        CHECK(refused);
    }
}

void many_threads_submit_promote_and_cancel(std::mt19937_64& random) {
    const World world(random, 7, 3, 20'000, 2);
    CopyEngine engine(world.catalog, {3, 2 * kPage, true});
    std::atomic<int> calls{0}, wrong{0};
    constexpr int kThreads = 6, kRounds = 60;
    {
        std::vector<std::jthread> threads;
        for (int i = 0; i < kThreads; ++i) {
            threads.emplace_back([&, seed = random()] {
                std::mt19937_64 own(seed);
                for (int round = 0; round < kRounds; ++round) {
                    std::vector slot(world.slot_bytes, kPoison);
                    const auto expert = static_cast<int32_t>(own() % 7);
                    std::latch done(1);
                    const auto transfer = engine.submit(
                        expert, slot.data(), own() % 2 ? Priority::kDemand : Priority::kPrefetch,
                        [&](const TransferPtr&) {
                            ++calls;
                            done.count_down();
                        });
                    if (own() % 2) engine.promote(transfer);
                    const bool cancelled = own() % 3 == 0 && engine.cancel(transfer);
                    done.wait();
                    const bool right = cancelled
                                           ? transfer->state() == TransferState::kCancelled &&
                                                 slot == std::vector(world.slot_bytes, kPoison)
                                           : transfer->state() == TransferState::kDone &&
                                                 slot == world.expected(expert);
                    wrong += !right;
                }
            });
        }
    }
    CHECK_EQ(calls.load(), kThreads * kRounds);
    CHECK_EQ(wrong.load(), 0);
}

}  // namespace

int main() {
    std::mt19937_64 random(drawn_seed());
    every_byte_lands_in_its_place(random);
    demands_go_before_prefetches_and_promotion_makes_one(random);
    a_demand_overtakes_a_running_prefetch_at_the_next_chunk();
    what_is_cancelled_never_touches_its_slot(random);
    the_destructor_cancels_what_waits_and_ends_what_runs(random);
    a_running_transfer_stops_with_its_engine();
    a_read_that_fails_fails_its_transfer_and_leaves_the_engine_usable(random);
    nothing_is_written_after_a_failure_was_reported();
    a_reading_that_ends_early_or_fails_says_where();
    what_cannot_be_opened_is_named();
    settings_that_cannot_work_are_refused(random);
    many_threads_submit_promote_and_cancel(random);
    return test_result();
}
