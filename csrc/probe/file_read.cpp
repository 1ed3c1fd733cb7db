#include "probe/file_read.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <exception>
#include <filesystem>
#include <iterator>
#include <memory>
#include <mutex>
#include <random>
#include <system_error>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/sizes.h"
#include "memory/arena.h"
#include "transfer/source_file.h"

namespace moeinf {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr uint64_t kMinFile = uint64_t{1} << 20;

constexpr ReadWay kWays[] = {{size_t{8} << 20, 1, 0},
                             {size_t{4} << 20, 2, 0},
                             {size_t{4} << 20, 4, 0},
                             {size_t{2} << 20, 4, 0},
                             {size_t{1} << 20, 8, 0}};

CatalogFile file_to_read(const std::string& path) {
    try {
        if (!fs::is_directory(path)) return {path, fs::file_size(path)};
        CatalogFile largest{path, 0};
        for (const fs::directory_entry& entry : fs::directory_iterator(path)) {
            if (entry.is_regular_file() && entry.file_size() > largest.nbytes) {
                largest = {entry.path().string(), entry.file_size()};
            }
        }
        return largest;
    } catch (const fs::filesystem_error& error) {
        throw Error(ErrorCode::kRead, path + ": cannot be examined: " + error.code().message());
    }
}

// Bytes per second. Reads from `start` on and begins again at the end of the file. Each thread has
// one request at a time. Sets `start` to the place where the next call should go on.
double measure(const SourceFile& file, const std::string& path, const ReadWay& way, double seconds,
               uint64_t& start) {
    const uint64_t requests = std::max<uint64_t>(1, file.nbytes() / way.request_bytes);
    const size_t request_bytes =
        static_cast<size_t>(std::min<uint64_t>(way.request_bytes, file.nbytes())) /
        kChunkAlignment * kChunkAlignment;
    std::atomic<uint64_t> next{start / way.request_bytes};
    std::atomic<uint64_t> total{0};
    std::mutex failure_lock;
    std::exception_ptr failure;

    // Huge pages: the kernel splits a request that covers many small pages.
    const size_t buffer_bytes = round_up(request_bytes, kHugePage);
    std::vector<std::unique_ptr<Arena>> buffers;
    for (int32_t i = 0; i < way.in_flight; ++i) {
        buffers.push_back(make_host_arena(buffer_bytes));
        buffers.back()->commit(buffer_bytes);
        std::fill_n(buffers.back()->data(), request_bytes,
                    std::byte{1});  // so the pages exist before the clock starts
    }
    const Clock::time_point began = Clock::now();
    const auto deadline = began + std::chrono::duration<double>(seconds);
    {
        std::vector<std::jthread> readers;
        for (const std::unique_ptr<Arena>& buffer : buffers) {
            readers.emplace_back([&, out = buffer->data()] {
                try {
                    do {
                        const uint64_t offset = next.fetch_add(1) % requests * request_bytes;
                        read_fully(file.descriptor(), path,
                                   {offset, request_bytes, request_bytes, file.alignment()}, out);
                        total += request_bytes;
                    } while (Clock::now() < deadline);
                } catch (...) {
                    const std::lock_guard lock(failure_lock);
                    failure = std::current_exception();
                }
            });
        }
    }
    if (failure) std::rethrow_exception(failure);
    const std::chrono::duration<double> elapsed = Clock::now() - began;
    start = next * way.request_bytes;
    return static_cast<double>(total) / elapsed.count();
}

}  // namespace

ReadBandwidth read_bandwidth(const std::string& path, double seconds) {
    if (!(seconds > 0) || !std::isfinite(seconds)) {
        throw Error(ErrorCode::kInvalid,
                    "expected a positive number of seconds, found " + std::to_string(seconds));
    }
    const CatalogFile chosen = file_to_read(path);
    const SourceFile file(chosen, true);
    if (chosen.nbytes < kMinFile) {
        throw Error(ErrorCode::kInvalid,
                    chosen.path + ": expected at least " + std::to_string(kMinFile) +
                        " bytes to measure with, found " + std::to_string(chosen.nbytes));
    }
    // A random place: the drive or the host may have the last bytes read in a cache.
    uint64_t start = std::random_device{}() % chosen.nbytes;
    ReadBandwidth result{chosen.path, file.direct(), {std::begin(kWays), std::end(kWays)}};
    for (ReadWay& way : result.ways) {
        const double share = seconds / static_cast<double>(result.ways.size());
        way.bytes_per_second = measure(file, chosen.path, way, share, start);
    }
    std::sort(result.ways.begin(), result.ways.end(),
              [](const ReadWay& left, const ReadWay& right) {
                  return left.bytes_per_second > right.bytes_per_second;
              });
    return result;
}

}  // namespace moeinf
