#include "base/fork.h"

#include <pthread.h>

#include <atomic>

namespace moeinf {
namespace {

// Of the process by nature, like its id.
std::atomic<int64_t> forks{0};

}  // namespace

int64_t process_generation() noexcept {
    static const int watching = pthread_atfork(nullptr, nullptr, [] { ++forks; });
    (void)watching;
    return forks.load(std::memory_order_relaxed);
}

}  // namespace moeinf
