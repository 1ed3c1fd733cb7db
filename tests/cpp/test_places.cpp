// Copies of files in other places: faster together, and either may fail.
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "expert_files.h"
#include "transfer/file_reader.h"

using namespace moeinf;
using Clock = std::chrono::steady_clock;

namespace {

constexpr uint64_t kExpert = 64 << 10;
constexpr int32_t kExperts = 32;

// A disk of that speed: reads wait for one another, as on a full link. It can be made to fail.
class Disk final : public ByteSource {
public:
    Disk(std::string name, std::span<const std::byte> bytes, double bytes_per_second)
        : name_(std::move(name)), bytes_(bytes), speed(bytes_per_second) {}

    void read(uint64_t offset, std::span<std::byte> out) const override {
        ++reads;
        Clock::time_point until;
        {
            const std::lock_guard lock(queue_);
            const std::chrono::duration<double> takes(static_cast<double>(out.size()) / speed);
            free_at_ = std::max(free_at_, Clock::now()) +
                       std::chrono::duration_cast<Clock::duration>(takes);
            until = free_at_;
        }
        std::this_thread::sleep_until(until);
        while (hangs) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        if (fails) throw Error(ErrorCode::kRead, "Input/output error of " + name_);
        std::memcpy(out.data(), bytes_.data() + offset, out.size());
    }

private:
    const std::string name_;
    const std::span<const std::byte> bytes_;
    mutable std::mutex queue_;
    mutable Clock::time_point free_at_{};

public:
    std::atomic<double> speed;
    mutable std::atomic<int> reads{0};
    std::atomic<bool> fails{false};
    std::atomic<bool> hangs{false};
};

// Experts on a disk, and the same on another, each with a speed.
struct TwoDisks {
    std::vector<std::byte> bytes;
    std::shared_ptr<Disk> first, second;
    std::vector<std::vector<std::byte>> slots{kExperts, std::vector(kExpert, kPoison)};

    TwoDisks(double speed, double speed_of_second) {
        std::mt19937_64 random(drawn_seed());
        bytes = random_bytes(kExpert * kExperts, random);
        first = std::make_shared<Disk>("one", bytes, speed);
        second = std::make_shared<Disk>("two", bytes, speed_of_second);
    }

    [[nodiscard]] std::shared_ptr<const Catalog> catalog(bool with_second) const {
        std::vector<CatalogFile> files{{"disk one", bytes.size(), first}};
        if (with_second) files[0].copies.push_back({1, "disk two", second});
        std::vector<Extent> extents;
        for (uint64_t i = 0; i < kExperts; ++i) extents.push_back({0, i * kExpert, kExpert, 0});
        return std::make_shared<const Catalog>(ModelShape{1, kExperts}, kExpert, files, extents);
    }

    // Reads experts of that range and checks their bytes. The seconds it took.
    double read(FileReader& reader, int32_t from = 0, int32_t to = kExperts) {
        for (auto& slot : slots) std::fill(slot.begin(), slot.end(), kPoison);
        const Clock::time_point began = Clock::now();
        std::vector<ReadJobPtr> jobs;
        for (int32_t i = from; i < to; ++i) {
            std::byte* const slot = slots[static_cast<size_t>(i)].data();
            jobs.push_back(reader.submit(ExpertId{i}, slot, Priority::kDemand, {}));
        }
        for (const ReadJobPtr& job : jobs) {
            while (job->state() <= ReadState::kRunning) {
                std::this_thread::sleep_for(std::chrono::microseconds(200));
            }
        }
        const double took = std::chrono::duration<double>(Clock::now() - began).count();
        for (int32_t i = from; i < to; ++i) {
            const auto at = static_cast<size_t>(i);
            CHECK(jobs[at - static_cast<size_t>(from)]->state() == ReadState::kDone);
            CHECK(std::memcmp(slots[at].data(), bytes.data() + at * kExpert, kExpert) == 0);
        }
        return took;
    }
};

const FileReaderOptions kFour{4, 16 << 10, true};

double share(const PlaceStats& part, const std::vector<PlaceStats>& all) {
    double total = 0;
    for (const PlaceStats& one : all) total += static_cast<double>(one.read_bytes);
    return static_cast<double>(part.read_bytes) / total;
}

TEST("two disks of equal speed read 1.7 times as fast as one") {
    double best = 0;
    for (int round = 0; round < 4 && best < 1.7; ++round) {  // other programs may disturb one
        TwoDisks disks(10e6, 10e6);
        FileReader one(disks.catalog(false), kFour);
        FileReader both(disks.catalog(true), kFour);
        const double alone = disks.read(one), together = disks.read(both);
        best = std::max(best, alone / together);
        CHECK_EQ(one.places().size(), size_t{1});
        CHECK_EQ(both.places().size(), size_t{2});
    }
    if (best < 1.7) std::cerr << "reached " << best << "\n";
    CHECK(best >= 1.7);
}

TEST("each disk reads as much as its speed allows, also when it becomes slower") {
    double share_at_first = 1, share_later = 1;
    for (int round = 0; round < 4 && (share_at_first > 0.35 || share_later > 0.2); ++round) {
        TwoDisks disks(40e6, 10e6);
        FileReader reader(disks.catalog(true), kFour);
        (void)disks.read(reader);
        share_at_first = share(reader.places()[1], reader.places());
        CHECK(share_at_first > 0);

        disks.first->speed = 10e6;
        disks.second->speed = 1e6;
        (void)disks.read(reader, 0, 8);  // it learns
        const int before[] = {disks.first->reads, disks.second->reads};
        (void)disks.read(reader);
        const double reads[] = {static_cast<double>(disks.first->reads - before[0]),
                                static_cast<double>(disks.second->reads - before[1])};
        share_later = reads[1] / (reads[0] + reads[1]);
    }
    CHECK(share_at_first <= 0.35);  // 0.2 by speed
    CHECK(share_later <= 0.2);      // 0.09 by speed
}

TEST("a disk that fails in mid-run loses no byte, and is left alone from then on") {
    for (const bool first_fails : {true, false}) {
        TwoDisks disks(200e6, 200e6);
        FileReader reader(disks.catalog(true), kFour);
        (void)disks.read(reader);
        Disk& broken = first_fails ? *disks.first : *disks.second;
        broken.fails = true;
        const int asked = broken.reads;
        for (int i = 0; i < 100 && broken.reads == asked; ++i) (void)disks.read(reader);
        const PlaceStats failed = reader.places()[first_fails ? 0 : 1];
        CHECK(failed.failure.find(first_fails ? "disk one: Input/output error of one"
                                              : "disk two: Input/output error of two") !=
              std::string::npos);
        CHECK(reader.places()[first_fails ? 1 : 0].failure.empty());
        const int reads = broken.reads;
        (void)disks.read(reader);
        CHECK_EQ(broken.reads.load(), reads);
        // The other one fails too, and the first has been mended meanwhile.
        (first_fails ? *disks.second : *disks.first).fails = true;
        broken.fails = false;
        (void)disks.read(reader);
    }
}

TEST("where both disks fail, the error names both") {
    TwoDisks disks(200e6, 200e6);
    FileReader reader(disks.catalog(true), kFour);
    disks.first->fails = disks.second->fails = true;
    std::vector<std::byte> slot(kExpert);
    const ReadJobPtr job = reader.submit(ExpertId{3}, slot.data(), Priority::kDemand, {});
    wait_until_finished(job);
    CHECK(job->state() == ReadState::kFailed);
    CHECK(job->error().find("disk one: ") != std::string::npos);
    CHECK(job->error().find("disk two: ") != std::string::npos);
    disks.first->fails = disks.second->fails = false;
    (void)disks.read(reader);
}

TEST("while a disk hangs, later reads go to the other") {
    TwoDisks disks(50e6, 50e6);
    FileReader reader(disks.catalog(true), kFour);
    (void)disks.read(reader);
    disks.second->hangs = true;
    std::vector<ReadJobPtr> jobs;
    for (int32_t i = 0; i < kExperts; ++i) {
        std::byte* const slot = disks.slots[static_cast<size_t>(i)].data();
        jobs.push_back(reader.submit(ExpertId{i}, slot, Priority::kDemand, {}));
    }
    const auto done = [&] {
        return std::count_if(jobs.begin(), jobs.end(), [](const ReadJobPtr& job) {
            return job->state() == ReadState::kDone;
        });
    };
    // It holds one read for each of its threads; each can hold up one expert.
    const Clock::time_point limit = Clock::now() + std::chrono::seconds(20);
    while (done() < kExperts - kFour.threads && Clock::now() < limit) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(done() >= kExperts - kFour.threads);
    disks.second->hangs = false;
    for (const ReadJobPtr& job : jobs) wait_until_finished(job);
    CHECK_EQ(done(), std::ptrdiff_t{kExperts});
}

TEST("a copy of some of the files serves those, with the same bytes in every slot") {
    std::mt19937_64 random(drawn_seed());
    for (int round = 0; round < 6; ++round) {
        const ExpertFiles world(random, 6, 3, 40'000, 3);
        std::vector<CatalogFile> files = world.files;
        for (size_t i = 0; i < files.size(); ++i) {
            if (i == 1) continue;
            const std::string path =
                world.folder.write("copy-" + std::to_string(i), world.contents[i]);
            files[i].copies.push_back({1 + static_cast<uint32_t>(random() % 3), path});
        }
        const auto catalog = std::make_shared<const Catalog>(ModelShape{1, 6}, world.slot_bytes,
                                                             files, world.extents);
        FileReader reader(catalog, {2, kPage * (1 + random() % 12), random() % 2 == 0});
        for (const ExpertId expert : ModelShape{1, 6}.experts()) {
            std::vector<std::byte> slot(world.slot_bytes, kPoison);
            wait_until_finished(reader.submit(expert, slot.data(), Priority::kDemand, {}));
            CHECK(slot == world.expected(expert));
        }
    }
}

TEST("a copy needs a place of its own and a file of the right size") {
    const ScratchFolder folder;
    const std::string path = folder.write("file", std::vector(100, std::byte{1}));
    const std::string shorter = folder.write("shorter", std::vector(99, std::byte{1}));
    const auto failure = [&](std::vector<CatalogCopy> copies) -> std::string {
        try {
            const FileReader reader(
                std::make_shared<const Catalog>(ModelShape{1, 1}, 100,
                                                std::vector<CatalogFile>{{path, 100, {}, copies}},
                                                std::vector<Extent>{{0, 0, 100, 0}}),
                {});
        } catch (const Error& error) {
            return error.what();
        }
        return {};
    };
    CHECK_EQ(failure({{1, path}, {2, path}}), std::string());
    for (const uint32_t place : {0U, Catalog::kMaxPlaces, 1U}) {
        CHECK(failure({{1, path}, {place, path}}).find("expected a place from 1 to 15") !=
              std::string::npos);
    }
    CHECK(failure({{1, shorter}}).find(shorter + ": expected a file of 100 bytes, found 99") !=
          std::string::npos);
}

}  // namespace

int main(int argc, char** argv) {
    return run_tests(argc, argv);
}
