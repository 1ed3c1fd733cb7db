// Shared by the files of the fake driver, which knows nothing of moeinf. The declarations follow
// NVIDIA's documentation. A call takes no lock at its start: a lock would hide races of the callers
// from ThreadSanitizer.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fake_cuda.h"

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace fake {

using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;
using Result = int;
using Handle = void*;
using DevicePointer = unsigned long long;

constexpr Result kSuccess = 0;
constexpr Result kInvalidValue = 1;
constexpr Result kOutOfMemory = 2;
constexpr Result kNotInitialized = 3;
constexpr Result kNoDevice = 100;
constexpr Result kInvalidDevice = 101;
constexpr Result kInvalidContext = 201;
constexpr Result kInvalidHandle = 400;
constexpr Result kNotFound = 500;
constexpr Result kNotReady = 600;
constexpr Result kIllegalAddress = 700;
constexpr Result kAlreadyRegistered = 712;
constexpr Result kNotRegistered = 713;
constexpr Result kMisalignedAddress = 716;
constexpr Result kCaptureUnsupported = 900;

constexpr int kMaxDevices = 8;
constexpr uint64_t kMemory = uint64_t{1} << 30;  // of each device, at the start

// One exported function: its calls are counted, and one of them can be made to fail.
class Call {
public:
    enum class Needs { kNothing, kInit, kContext };

    Call(const char* name, Needs needs);
    // Counts the call; anything but kSuccess is what it shall return at once.
    Result enter();
    void reset();
    void fail(uint64_t nth, Result result);

    const char* const name;
    std::atomic<uint64_t> count{0};

private:
    Needs needs_;
    std::atomic<uint64_t> until_failure_{0};  // 0: none is to fail
    std::atomic<Result> failure_{kSuccess};
};

std::vector<Call*>& all_calls();

// Defines an exported function whose body follows: FAKE_CALL(cuX, kContext, (int a)) { ... }
#define FAKE_CALL(name, needs, parameters)                          \
    static fake::Call call_##name(#name, fake::Call::Needs::needs); \
    FAKE_EXPORT fake::Result name parameters
#define FAKE_ENTER(name) \
    if (const fake::Result entered = call_##name.enter(); entered != fake::kSuccess) return entered

struct LinkSettings {
    std::atomic<double> bytes_per_second{0};
    std::atomic<uint64_t> latency_ns{0};
};

struct Settings {
    std::atomic<uint64_t> seed{0};
    std::atomic<uint64_t> memory[kMaxDevices];  // see fake_cuda_set_memory
    std::atomic<uint64_t> granularity{uint64_t{2} << 20};
    std::atomic<uint64_t> pinned_limit{UINT64_MAX};
    std::atomic<uint64_t> max_delay_ns{0};
    std::atomic<int> version{13000};
    std::atomic<int> devices{1};
    std::atomic<int> same_addresses{1};
    std::atomic<int> at_once{0};
    std::atomic<int> capturing{0};
    LinkSettings links[2];
};
Settings& settings();

// The device's context is broken from here on, as after a fault on a real device; says why on
// stderr.
void break_context(int device, Result result, const char* why);
bool is_broken(int device);
void mend_contexts();

// memory.cpp. Copies while no piece can be unmapped or unregistered; false where the device or
// the host memory is not (any more) what a copy of that device may touch.
struct Part {
    uint64_t source, target, nbytes;
};
bool copyable(const Part& part, int direction, int device);
bool copy_bytes(const std::vector<Part>& parts, int direction, int device);
void wait_for_copies();  // that move bytes now

// link.cpp. One copy engine each way of each device; moves the parts as one and returns when they
// are over. `ready` is when the copy could start, on the stream's clock; the result is when it
// ended.
struct Crossing {
    int direction, device, priority;
    Time enqueued, ready;
    bool early;  // its bytes appear at its start
};
Time cross_link(const std::vector<Part>& parts, const Crossing& crossing);
void reset_links();

// stream.cpp. A stream has a clock of its own that says when its last task was over: the thread
// behind it wakes a little late, the clock does not.
class Stream {
public:
    struct Turn {
        Time enqueued;
        Time ready;
        std::mt19937_64& random;
        int priority;
    };
    using Work = std::function<Time(const Turn&)>;  // returns when it was over

    Stream(int stream_priority, int stream_device);
    static std::shared_ptr<Stream> start(int priority, int device);
    void push(Work work);
    void close();
    bool idle();
    void wait_idle();
    const int priority;
    const int device;

private:
    void run();

    std::mutex mutex_;
    std::condition_variable work_, idle_;  // a task or the end; a task has ended
    std::deque<std::pair<Time, Work>> tasks_;
    bool busy_ = false;
    bool closing_ = false;
    std::mt19937_64 random_;
};
Stream& stream_of(Handle stream);  // null: the default stream of the current device
void release_hung_events();

}  // namespace fake
