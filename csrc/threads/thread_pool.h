// A few threads that share the tasks of one region at a time. Regions last tens of microseconds:
// the caller takes part, and waiting threads spin for a short time before they sleep. Any thread
// may run any task, so tasks must write disjoint results. The CPU engine uses it; it knows no
// experts.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "base/fork.h"

namespace moeinf {

class ThreadPool {
public:
    // `threads` counts the caller; 0 means one for each CPU this process may run on.
    explicit ThreadPool(int threads = 0);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    [[nodiscard]] int threads() const noexcept { return static_cast<int>(workers_.size()) + 1; }

    // Calls task(i) once for each i in [0, tasks) and returns when all are done; i is handed out in
    // ascending order. `task` must not throw, nor call run(). Callers on several threads wait for
    // one another. Throws Error(kUnsupported) in a child of fork(), where the threads are missing.
    template <class Task>
    void run(int64_t tasks, const Task& task) {
        static_assert(std::is_nothrow_invocable_v<const Task&, int64_t>);
        run_erased(
            tasks,
            [](const void* self, int64_t index) noexcept {
                (*static_cast<const Task*>(self))(index);
            },
            &task);
    }

private:
    using Function = void (*)(const void*, int64_t) noexcept;

    void run_erased(int64_t tasks, Function function, const void* context);
    void work(uint32_t region);
    void worker_loop();

    const ForkDetector process_;
    std::mutex one_region_;

    // A region's number (upper half) and how many of its tasks nobody has claimed (lower half). A
    // late thread finds another number, or no task left.
    alignas(64) std::atomic<uint64_t> unclaimed_{0};
    alignas(64) std::atomic<int32_t> unfinished_{0};
    alignas(64) std::atomic<uint32_t> region_{0};  // sleeping workers watch this
    std::atomic<bool> stop_{false};

    // The region's. A thread reads them only after it has claimed a task: until that task is
    // finished, the caller does not begin the next region, which overwrites them.
    int64_t tasks_ = 0;
    Function function_ = nullptr;
    const void* context_ = nullptr;

    std::vector<std::thread> workers_;
};

}  // namespace moeinf
