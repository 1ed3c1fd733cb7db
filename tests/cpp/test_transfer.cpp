// The file reader: every byte in its place, demands first, callbacks exactly once.
#include <atomic>
#include <latch>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "check.h"
#include "expert_files.h"
#include "transfer/file_reader.h"

using namespace moeinf;

namespace {

// Who finished, in order. Callbacks may come from any thread.
class Order {
public:
    ReadCallback note() {
        return [this](const ReadJobPtr& transfer) {
            const std::lock_guard guard(lock_);
            experts_.push_back(transfer->expert());
        };
    }
    std::vector<ExpertId> experts() {
        const std::lock_guard guard(lock_);
        return experts_;
    }

private:
    std::mutex lock_;
    std::vector<ExpertId> experts_;
};

// Holds the engine's only worker inside a callback until opened.
class Gate {
public:
    Gate(FileReader& engine, ExpertId expert, std::byte* slot) {
        transfer_ = engine.submit(expert, slot, Priority::kDemand, [this](const ReadJobPtr&) {
            entered_.count_down();
            open_.wait();
        });
        entered_.wait();
    }
    void open() { open_.count_down(); }

private:
    std::latch entered_{1};
    std::latch open_{1};
    ReadJobPtr transfer_;
};

TEST("matrices that files hold the other way round are turned on their way into the slot") {
    std::mt19937_64 random(drawn_seed());
    for (int round = 0; round < 24; ++round) {
        const ExpertFiles world(random, 4, 3, random() % 2 ? 40'000 : 30, 2);
        std::vector<Transpose> transposes;
        for (size_t i = 0; i < world.per_expert; ++i) {
            const Extent& extent = world.extents[i];
            uint64_t element = uint64_t{1} << (random() % 3);
            while (extent.slot_offset % element != 0) element /= 2;
            const uint64_t elements = extent.nbytes / element;
            if (elements == 0) continue;
            // Some matrices have rows longer than a chunk.
            const uint64_t rows =
                1 + random() % std::min<uint64_t>(elements, random() % 2 ? 3 : 100);
            transposes.push_back({extent.slot_offset, rows, elements / rows, element});
        }
        const auto catalog = std::make_shared<const Catalog>(
            ModelShape{1, 4}, world.slot_bytes, world.files, world.extents, transposes);
        FileReaderOptions options;
        options.threads = static_cast<int32_t>(1 + random() % 4);
        options.chunk_bytes = kPage * (1 + random() % 12);
        options.direct = random() % 4 != 0;
        FileReader engine(catalog, options);
        for (const ExpertId expert : ModelShape{1, 4}.experts()) {
            std::vector<std::byte> slot(world.slot_bytes, kPoison);
            const ReadJobPtr transfer = engine.submit(expert, slot.data(), Priority::kDemand, {});
            wait_until_finished(transfer);
            CHECK(transfer->state() == ReadState::kDone);
            const std::vector<std::byte> read = world.expected(expert);
            std::vector<std::byte> expected = read;
            for (const auto& [offset, rows, cols, element] : transposes) {
                for (uint64_t i = 0; i < rows * cols * element; ++i) {
                    const uint64_t row = i / (cols * element), col = i / element % cols;
                    expected[offset + (col * rows + row) * element + i % element] =
                        read[offset + i];
                }
            }
            CHECK(slot == expected);
        }
    }
}

TEST("every byte lands in its place") {
    std::mt19937_64 random(drawn_seed());
    for (int round = 0; round < 12; ++round) {
        const size_t largest = std::vector<size_t>{3, 600, 40'000, 300'000}[random() % 4];
        const ExpertFiles world(random, 6, 1 + random() % 5, largest, 1 + random() % 3);
        FileReaderOptions options;
        options.threads = static_cast<int32_t>(1 + random() % 4);
        options.chunk_bytes = kPage * (1 + random() % 40);
        options.direct = random() % 4 != 0;
        std::vector<std::vector<std::byte>> slots(12, std::vector(world.slot_bytes, kPoison));
        std::vector<ReadJobPtr> transfers;
        {
            FileReader engine(world.catalog, options);
            for (int32_t i = 0; i < 12; ++i) {
                const Priority priority = random() % 2 ? Priority::kDemand : Priority::kPrefetch;
                transfers.push_back(engine.submit(
                    ExpertId{i % 6}, slots[static_cast<size_t>(i)].data(), priority, {}));
            }
            for (const ReadJobPtr& transfer : transfers) wait_until_finished(transfer);
        }
        for (int32_t i = 0; i < 12; ++i) {
            CHECK(transfers[static_cast<size_t>(i)]->state() == ReadState::kDone);
            CHECK(slots[static_cast<size_t>(i)] == world.expected(ExpertId{i % 6}));
        }
    }
}

TEST("demands go before prefetches and promotion makes one") {
    std::mt19937_64 random(drawn_seed());
    const ExpertFiles world(random, 6, 2, 5'000, 1);
    std::vector slots(6, std::vector(world.slot_bytes, kPoison));
    Order order;
    {
        FileReader engine(world.catalog, {1, kPage, true});
        Gate gate(engine, ExpertId{0}, slots[0].data());
        const auto submit = [&](int32_t expert, Priority priority) {
            return engine.submit(ExpertId{expert}, slots[static_cast<size_t>(expert)].data(),
                                 priority, order.note());
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
    CHECK(order.experts() == (FlatExperts{4, 2, 5, 1, 3}));
}

// With one worker, a demand that ends before a prefetch which ran already when it was submitted
// must have been taken up between two chunks of it. A stalled test may submit too late, so it tries
// again; an engine that finishes what it began would fail every time.
TEST("a demand overtakes a running prefetch at the next chunk") {
    bool overtook = false;
    for (int attempt = 0; attempt < 50 && !overtook; ++attempt) {
        LargeExperts large;
        Order order;
        FileReader engine(large.catalog, {1, kPage, true});
        const auto prefetch =
            engine.submit(ExpertId{0}, large.slots[0].data(), Priority::kPrefetch, order.note());
        while (prefetch->state() == ReadState::kQueued) std::this_thread::yield();
        const auto demand =
            engine.submit(ExpertId{1}, large.slots[1].data(), Priority::kDemand, order.note());
        wait_until_finished(demand);
        wait_until_finished(prefetch);
        while (order.experts().size() < 2) std::this_thread::yield();
        overtook = order.experts() == FlatExperts{1, 0};
    }
    CHECK(overtook);
}

TEST("the destructor cancels what waits and ends what runs") {
    std::mt19937_64 random(drawn_seed());
    const ExpertFiles world(random, 4, 2, 9'000, 1);
    const std::vector untouched(world.slot_bytes, kPoison);
    std::vector slots(4, untouched);
    std::atomic<int> cancelled{0};
    auto engine = std::make_unique<FileReader>(world.catalog, FileReaderOptions{1, kPage, true});
    Gate gate(*engine, ExpertId{0}, slots[0].data());
    for (const int32_t expert : {1, 2, 3}) {
        (void)engine->submit(ExpertId{expert}, slots[static_cast<size_t>(expert)].data(),
                             expert == 1 ? Priority::kDemand : Priority::kPrefetch,
                             [&](const ReadJobPtr& transfer) {
                                 cancelled += transfer->state() == ReadState::kCancelled;
                             });
    }
    std::jthread destroyer([&] { engine.reset(); });
    while (cancelled < 3) std::this_thread::yield();
    gate.open();
    destroyer.join();
    CHECK_EQ(cancelled.load(), 3);
    CHECK(slots[0] == world.expected(ExpertId{0}));
    for (const size_t i : {1, 2, 3}) CHECK(slots[i] == untouched);
}

TEST("a running transfer stops with its engine") {
    LargeExperts large;
    std::atomic<int> calls{0};
    ReadJobPtr transfer;
    {
        FileReader engine(large.catalog, {2, kPage, true});
        transfer = engine.submit(ExpertId{0}, large.slots[0].data(), Priority::kDemand,
                                 [&](const ReadJobPtr&) { ++calls; });
        while (transfer->state() == ReadState::kQueued) std::this_thread::yield();
    }
    CHECK_EQ(calls.load(), 1);
    CHECK(transfer->state() >= ReadState::kDone);
    CHECK(transfer->state() != ReadState::kFailed);
}

TEST("many threads submit and promote") {
    std::mt19937_64 random(drawn_seed());
    const ExpertFiles world(random, 7, 3, 20'000, 2);
    FileReader engine(world.catalog, {3, 2 * kPage, true});
    std::atomic<int> calls{0}, wrong{0};
    constexpr int kThreads = 6, kRounds = 60;
    {
        std::vector<std::jthread> threads;
        for (int i = 0; i < kThreads; ++i) {
            threads.emplace_back([&, seed = random()] {
                std::mt19937_64 own(seed);
                for (int round = 0; round < kRounds; ++round) {
                    std::vector slot(world.slot_bytes, kPoison);
                    const ExpertId expert{static_cast<int32_t>(own() % 7)};
                    std::latch done(1);
                    const auto transfer = engine.submit(
                        expert, slot.data(), own() % 2 ? Priority::kDemand : Priority::kPrefetch,
                        [&](const ReadJobPtr&) {
                            ++calls;
                            done.count_down();
                        });
                    if (own() % 2) engine.promote(transfer);
                    done.wait();
                    wrong +=
                        transfer->state() != ReadState::kDone || slot != world.expected(expert);
                }
            });
        }
    }
    CHECK_EQ(calls.load(), kThreads * kRounds);
    CHECK_EQ(wrong.load(), 0);
}

}  // namespace

int main(int argc, char** argv) {
    return run_tests(argc, argv);
}
