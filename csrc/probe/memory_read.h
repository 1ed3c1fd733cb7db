// Measures how fast the threads of an engine can read memory when they do nothing else. This is the
// limit of memory-bound kernels. Benchmarks and `moeinf doctor` call it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "threads/thread_pool.h"

namespace moeinf {

// Reads every byte of data[0, nbytes) once, in tasks of `task_bytes` (a multiple of 4096). A task
// reads `streams` (1 to 8) equal parts side by side; the fastest pattern differs between machines.
// Returns the bitwise or of all 64-bit words, so the compiler cannot remove a read. `data` must be
// aligned to 64 bytes, and nbytes must be a multiple of task_bytes.
[[nodiscard]] uint64_t read_all(ThreadPool& pool, const std::byte* data, size_t nbytes,
                                size_t task_bytes, int streams);

}  // namespace moeinf
