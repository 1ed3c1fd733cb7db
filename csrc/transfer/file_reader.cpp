#include "transfer/file_reader.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <list>
#include <mutex>
#include <optional>
#include <stop_token>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/fork.h"
#include "base/ranges.h"
#include "base/sizes.h"
#include "memory/arena.h"
#include "transfer/number_check.h"
#include "transfer/places.h"
#include "transfer/read_plan.h"
#include "transfer/recode.h"

namespace moeinf {

namespace {

constexpr int32_t kDefaultThreads = 12;  // see benchmarks/notes/transfer.md
constexpr int32_t kMaxThreads = 256;
constexpr size_t kDefaultChunkBytes = size_t{1} << 20;
constexpr size_t kMaxChunkBytes = size_t{1} << 30;
constexpr size_t kNeverCut = size_t{1} << 62;
// How often a worker asks again whether to wait for a place that is full. See Places::choose.
constexpr std::chrono::milliseconds kAskAgain{5};

struct Job;
using Queue = std::list<std::shared_ptr<Job>>;

// A transfer with its plan, slot and callback. The reader's lock guards all other members until the
// last chunk has ended.
struct Job final : ReadJob {
    ReadPlan plan;
    std::byte* slot = nullptr;
    ReadCallback done;
    Queue* queue = nullptr;    // the queue that holds it; null after its last chunk has started
    Queue::iterator position;  // in `queue`
    size_t next_chunk = 0;
    size_t chunks_in_flight = 0;
    bool cut_short = false;  // the reader ended before all chunks had started
    std::string failure;     // the first one
};
using JobPtr = std::shared_ptr<Job>;

FileReaderOptions resolved(FileReaderOptions options) {
    if (options.threads < 0 || options.threads > kMaxThreads) {
        throw Error(ErrorCode::kInvalid, "expected 0 to " + std::to_string(kMaxThreads) +
                                             " copy threads, found " +
                                             std::to_string(options.threads));
    }
    if (options.threads == 0) options.threads = kDefaultThreads;
    if (options.chunk_bytes == 0) options.chunk_bytes = kDefaultChunkBytes;
    if (options.chunk_bytes % kChunkAlignment != 0 || options.chunk_bytes > kMaxChunkBytes) {
        throw Error(ErrorCode::kInvalid, "expected chunks of a multiple of " +
                                             std::to_string(kChunkAlignment) + " bytes, at most " +
                                             std::to_string(kMaxChunkBytes) + ", found " +
                                             std::to_string(options.chunk_bytes));
    }
    return options;
}

// Called without the lock. The callback is dropped after the call, so the objects that it holds do
// not live as long as the transfer.
void finish(const JobPtr& job, ReadState state) {
    ReadCallback done = std::exchange(job->done, nullptr);
    ReadJobAccess::set_state(*job, state);
    if (done) done(job);
}

}  // namespace

struct FileReader::Impl {
    Impl(std::shared_ptr<const Catalog> the_catalog, FileReaderOptions the_options)
        : catalog(std::move(the_catalog)),
          options(resolved(the_options)),
          places(*catalog, options.direct, options.threads) {
        const size_t alignment = std::max<size_t>(kChunkAlignment, places.alignment());
        // One buffer per worker, for a chunk rounded to the alignment at both ends. The buffers
        // share huge pages: a disk takes one piece of memory per page, and only few pieces per
        // request.
        const size_t each = round_up(options.chunk_bytes + 2 * alignment, alignment);
        const auto workers_wanted = static_cast<size_t>(options.threads) * places.count();
        bounces = make_host_arena(round_up(workers_wanted * each, kHugePage));
        bounces->commit(bounces->reserved());
        try {
            for (size_t i = 0; i < workers_wanted; ++i) {
                const std::span<std::byte> bounce{bounces->data() + i * each, each};
                workers.emplace_back(
                    [this, bounce](const std::stop_token& stop) { work(stop, bounce); });
            }
        } catch (const std::system_error& error) {
            throw Error(ErrorCode::kCapacity, "cannot start " + std::to_string(workers_wanted) +
                                                  " copy threads: " + error.what());
        }
    }

    // A fork copies no threads, and the child may have copied a locked lock.
    [[nodiscard]] bool forked() const noexcept { return process.forked(); }

    void enqueue(const JobPtr& job, Queue& queue) {
        job->queue = &queue;
        job->position = queue.insert(queue.end(), job);
    }

    static void dequeue(const JobPtr& job) {
        if (job->queue == nullptr) return;
        Queue* const queue = std::exchange(job->queue, nullptr);
        queue->erase(job->position);
    }

    void work(const std::stop_token& stop, std::span<std::byte> buffer) {
        std::vector<uint32_t> scratch;  // of recodes
        std::unique_lock lock(queues);
        std::optional<uint32_t> place;
        while (wait_for_work(lock, stop, place)) {
            const JobPtr job = next();
            const Chunk& chunk = job->plan.chunks[job->next_chunk++];
            ++job->chunks_in_flight;
            if (job->next_chunk == job->plan.chunks.size()) dequeue(job);
            ReadJobAccess::set_state(*job, ReadState::kRunning);

            std::string failure = read(lock, *job, chunk, *place, buffer);

            --job->chunks_in_flight;
            if (!failure.empty()) {
                if (job->failure.empty()) job->failure = std::move(failure);
                dequeue(job);
            }
            if (job->queue == nullptr && job->chunks_in_flight == 0) {
                lock.unlock();
                complete(*job, scratch);
                conclude(job);
                lock.lock();
            }
        }
    }

    [[nodiscard]] const JobPtr& next() { return (demands.empty() ? prefetches : demands).front(); }
    [[nodiscard]] bool has_work() const { return !demands.empty() || !prefetches.empty(); }

    // Waits for a chunk and for the place to read it from. False once the reader ends.
    bool wait_for_work(std::unique_lock<std::mutex>& lock, const std::stop_token& stop,
                       std::optional<uint32_t>& place) {
        while (ready.wait(lock, stop, [this] { return has_work(); })) {
            const JobPtr& job = next();
            const Chunk& chunk = job->plan.chunks[job->next_chunk];
            place = places.choose(chunk.file, chunk.end - chunk.begin);
            if (place) return true;
            (void)ready.wait_for(lock, stop, kAskAgain, [] { return false; });
        }
        return false;
    }

    // Reads from one place after another until one of them has read the chunk. The error messages,
    // or empty. The lock is released meanwhile.
    std::string read(std::unique_lock<std::mutex>& lock, const Job& job, const Chunk& chunk,
                     std::optional<uint32_t> place, std::span<std::byte> buffer) {
        const uint64_t nbytes = chunk.end - chunk.begin;
        std::string failures;
        for (uint32_t tried = 0; place; place = places.choose_next(chunk.file, nbytes, tried)) {
            tried |= uint32_t{1} << *place;
            const auto reading = places.begin(*place, nbytes);
            lock.unlock();
            const std::string failure =
                read_from(places.file(chunk.file, *place), job, chunk, buffer);
            lock.lock();
            places.end(reading, failure);
            if (failure.empty()) return {};
            if (failure != failures) failures += (failures.empty() ? "" : "; ") + failure;
        }
        return failures;
    }

    // The error message, or empty.
    std::string read_from(const SourceFile& file, const Job& job, const Chunk& chunk,
                          std::span<std::byte> buffer) const {
        const Range range("moeinf read");
        try {
            SourceFile::Landed check = nullptr;
            if (!catalog->checks().empty() && !catalog->cuts_numbers()) {
                check = [this, &job](uint64_t begin, uint64_t end) {
                    check_numbers(*catalog, job.expert(), job.slot, begin, end);
                };
            }
            file.read(chunk, job.plan.pieces_of(chunk), catalog->transposes(), job.slot, buffer,
                      check);
        } catch (const std::exception& error) {
            return error.what();
        }
        return {};
    }

    // Once the last chunk is there: what needs more of an expert than a chunk has.
    void complete(Job& job, std::vector<uint32_t>& scratch) const {
        if (!job.failure.empty() || job.cut_short) return;
        try {
            if (catalog->cuts_numbers()) {
                check_numbers(*catalog, job.expert(), job.slot, 0, catalog->slot_bytes());
            }
            recode(catalog->recodes(), job.slot, scratch);
        } catch (const std::exception& error) {
            job.failure = error.what();
        }
    }

    static void conclude(const JobPtr& job) {
        if (!job->failure.empty()) {
            ReadJobAccess::set_error(*job, std::move(job->failure));
            finish(job, ReadState::kFailed);
        } else {
            finish(job, job->cut_short ? ReadState::kCancelled : ReadState::kDone);
        }
    }

    // Empties the queues. A transfer without a chunk in flight ends here; the workers end the
    // others.
    void cancel_all() {
        std::vector<JobPtr> idle;
        {
            const std::lock_guard lock(queues);
            for (Queue* queue : {&demands, &prefetches}) {
                while (!queue->empty()) {
                    const JobPtr job = queue->front();
                    dequeue(job);
                    job->cut_short = true;
                    if (job->chunks_in_flight == 0) idle.push_back(job);
                }
            }
        }
        for (const JobPtr& job : idle) finish(job, ReadState::kCancelled);
    }

    const std::shared_ptr<const Catalog> catalog;
    const FileReaderOptions options;
    const ForkDetector process;
    std::unique_ptr<Arena> bounces;  // one buffer per worker

    // Guards the places, both queues and every unfinished job. Never held in a callback.
    mutable std::mutex queues;
    Places places;
    std::condition_variable_any ready;
    Queue demands;
    Queue prefetches;
    std::vector<std::jthread> workers;  // last member: destroyed first, before all that they use
};

FileReader::FileReader(std::shared_ptr<const Catalog> catalog, FileReaderOptions options) {
    if (catalog == nullptr) throw Error(ErrorCode::kInvalid, "a file reader needs a catalog");
    impl_ = std::make_unique<Impl>(std::move(catalog), options);
}

FileReader::~FileReader() {
    if (impl_->forked()) {
        // The threads do not exist in this process, so joining them would never end.
        (void)impl_.release();
        return;
    }
    impl_->cancel_all();
}

ReadJobPtr FileReader::submit(ExpertId expert, std::byte* slot, Priority priority,
                              ReadCallback done) {
    if (impl_->forked()) {
        throw Error(ErrorCode::kUnsupported,
                    "a file reader does not survive a fork: make a new one in the child process");
    }
    auto job = std::make_shared<Job>();
    ReadJobAccess::begin(*job, expert);
    const size_t cut_at = impl_->catalog->may_cut() ? impl_->options.chunk_bytes : kNeverCut;
    job->plan = plan_reads(impl_->catalog->extents(expert), cut_at);
    job->slot = slot;
    job->done = std::move(done);
    {
        const std::lock_guard lock(impl_->queues);
        impl_->enqueue(job, priority == Priority::kDemand ? impl_->demands : impl_->prefetches);
    }
    impl_->ready.notify_all();
    return job;
}

void FileReader::promote(const ReadJobPtr& transfer) {
    if (impl_->forked()) return;
    const auto job = std::static_pointer_cast<Job>(transfer);
    const std::lock_guard lock(impl_->queues);
    if (job->queue != &impl_->prefetches) return;
    job->queue = &impl_->demands;
    impl_->demands.splice(impl_->demands.end(), impl_->prefetches, job->position);
}

bool FileReader::file_is_direct(uint32_t file) const {
    const size_t files = impl_->catalog->files().size();
    if (file >= files) {
        throw Error(ErrorCode::kInvalid, "expected a file index below " + std::to_string(files) +
                                             ", found " + std::to_string(file));
    }
    return impl_->places.file(file, 0).direct();
}

std::vector<PlaceStats> FileReader::places() const {
    const std::lock_guard lock(impl_->queues);
    return impl_->places.stats();
}

const FileReaderOptions& FileReader::options() const noexcept {
    return impl_->options;
}

}  // namespace moeinf
