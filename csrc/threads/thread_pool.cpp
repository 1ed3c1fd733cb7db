#include "threads/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <limits>
#include <string>

#include "base/error.h"

namespace moeinf {
namespace {

// About 20 us: longer than the gap between two regions of one FFN, and too short to disturb other
// programs. A sleeping thread needs about 50 us to wake up.
constexpr int kSpins = 1000;
constexpr uint64_t kCount = 0xffffffff;  // the lower half of the unclaimed tasks' word

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Returns the value once it is no longer `old`.
template <class T>
T wait_for_change(const std::atomic<T>& value, T old) {
    for (int i = 0; i < kSpins; ++i) {
        const T now = value.load(std::memory_order_acquire);
        if (now != old) return now;
        relax();
    }
    value.wait(old, std::memory_order_acquire);
    return value.load(std::memory_order_acquire);
}

int usable_cpus() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
    if (threads < 0 || threads > 1024) {
        throw Error(ErrorCode::kInvalid, "a thread pool needs 0 (all CPUs) to 1024 threads, got " +
                                             std::to_string(threads));
    }
    const int count = threads == 0 ? usable_cpus() : threads;
    workers_.reserve(static_cast<size_t>(count - 1));
    for (int i = 1; i < count; ++i) workers_.emplace_back([this] { worker_loop(); });
}

ThreadPool::~ThreadPool() {
    if (process_.forked()) {  // only the parent process has the threads
        for (std::thread& worker : workers_) worker.detach();
        return;
    }
    stop_.store(true, std::memory_order_release);
    region_.fetch_add(1, std::memory_order_release);
    region_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run_erased(int64_t tasks, Function function, const void* context) {
    if (tasks <= 0) return;
    if (workers_.empty() || tasks == 1) {
        for (int64_t i = 0; i < tasks; ++i) function(context, i);
        return;
    }
    if (process_.forked()) {
        throw Error(ErrorCode::kUnsupported,
                    "this thread pool was made before fork(), and its threads do not exist in the "
                    "child: make a new one after forking");
    }
    if (tasks > std::numeric_limits<int32_t>::max()) {
        throw Error(ErrorCode::kInvalid, "too many tasks for one region: " + std::to_string(tasks));
    }
    const std::lock_guard lock(one_region_);
    const uint32_t region = region_.load(std::memory_order_relaxed) + 1;
    tasks_ = tasks;
    function_ = function;
    context_ = context;
    unfinished_.store(static_cast<int32_t>(tasks), std::memory_order_relaxed);
    unclaimed_.store(uint64_t{region} << 32 | static_cast<uint32_t>(tasks),
                     std::memory_order_release);
    region_.store(region, std::memory_order_release);
    region_.notify_all();
    work(region);
    int32_t left = unfinished_.load(std::memory_order_acquire);
    while (left != 0) left = wait_for_change(unfinished_, left);
}

void ThreadPool::work(uint32_t region) {
    uint64_t seen = unclaimed_.load(std::memory_order_acquire);
    while (seen >> 32 == region && (seen & kCount) != 0) {
        if (!unclaimed_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel,
                                              std::memory_order_acquire)) {
            continue;
        }
        function_(context_, tasks_ - static_cast<int64_t>(seen & kCount));
        if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
        seen = unclaimed_.load(std::memory_order_acquire);
    }
}

void ThreadPool::worker_loop() {
    uint32_t seen = 0;
    while (true) {
        seen = wait_for_change(region_, seen);
        if (stop_.load(std::memory_order_acquire)) return;
        work(seen);
    }
}

}  // namespace moeinf
