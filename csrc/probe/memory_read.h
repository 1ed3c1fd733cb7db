// The limit that memory-bound kernels are measured against: how fast the threads of an engine can
// read memory when they do nothing else. Called by benchmarks and by `moeinf doctor`.
#pragma once

#include <cstddef>
#include <cstdint>

#include "compute/thread_pool.h"

namespace moeinf {

// Reads every byte of data[0, nbytes) once, in tasks of `task_bytes` (a multiple of 4096) of which
// each walks `streams` (1 to 8) equal parts side by side; which pattern is fastest differs between
// machines. Returns the bitwise or of all 64-bit words, so that no read can be left out. `data`
// must be aligned to 64 bytes and nbytes a multiple of task_bytes.
[[nodiscard]] uint64_t read_all(ThreadPool& pool, const std::byte* data, size_t nbytes,
                                size_t task_bytes, int streams);

}  // namespace moeinf
