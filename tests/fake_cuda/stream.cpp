// Streams, each a thread that works off its tasks in order, and the events between them.
#include <sys/prctl.h>

#include <algorithm>
#include <thread>

#include "context.h"
#include "fake.h"

namespace fake {
namespace {

std::atomic<uint64_t> streams_started{0};
std::atomic<uint64_t> live_streams{0};
std::atomic<uint64_t> live_events{0};
std::atomic<bool> hang_next{false};
std::atomic<uint64_t> captures_ended{0};

// One recording of an event. A wait holds on to the one that was newest when it was enqueued.
struct Generation {
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    Time at{};

    void complete(Time time) {
        const std::lock_guard lock(mutex);
        done = true;
        at = time;
        changed.notify_all();
    }

    Time wait() {
        std::unique_lock lock(mutex);
        changed.wait(lock, [&] { return done; });
        return at;
    }

    bool is_done() {
        const std::lock_guard lock(mutex);
        return done;
    }
};

struct Event {
    const int device;
    std::mutex mutex;
    std::shared_ptr<Generation> newest;  // null: never recorded

    std::shared_ptr<Generation> get() {
        const std::lock_guard lock(mutex);
        return newest;
    }
};

struct Hang {
    std::mutex mutex;
    std::condition_variable changed;
    uint64_t resets = 0;
};

Hang& hang() {
    static Hang* const one = new Hang;
    return *one;
}

void hang_until_reset() {
    std::unique_lock lock(hang().mutex);
    const uint64_t before = hang().resets;
    hang().changed.wait(lock, [&] { return hang().resets != before; });
}

constexpr int kCaptureRelaxed = 2;
thread_local int capture_mode = 0;  // global: a capture anywhere forbids this thread much

struct StreamHandle {
    std::shared_ptr<Stream> stream;
};

// The layout of the one kernel's argument is the caller's business; these are its rows.
std::vector<Part> gather_parts(void** parameters, unsigned count) {
    const Part* table = static_cast<const Part*>(parameters[0]);
    return {table, table + count};
}

int module_handle;
int gather_handle;

}  // namespace

Stream::Stream(int stream_priority, int stream_device)
    : priority(stream_priority),
      device(stream_device),
      random_(settings().seed * 1000003 + ++streams_started) {}

std::shared_ptr<Stream> Stream::start(int priority, int device) {
    auto stream = std::make_shared<Stream>(priority, device);
    std::thread([stream] { stream->run(); }).detach();
    return stream;
}

void Stream::push(Work work) {
    std::unique_lock lock(mutex_);
    if (settings().at_once != 0 && tasks_.empty() && !busy_) {
        busy_ = true;
        lock.unlock();
        const Time now = Clock::now();
        (void)work({now, now, random_, priority});
        lock.lock();
        busy_ = false;
        idle_.notify_all();  // the stream's thread sleeps on: waking it would cost more than a step
    } else {
        tasks_.emplace_back(Clock::now(), std::move(work));
        work_.notify_all();
    }
}

void Stream::close() {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    work_.notify_all();
}

bool Stream::idle() {
    const std::lock_guard lock(mutex_);
    return tasks_.empty() && !busy_;
}

void Stream::wait_idle() {
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [&] { return tasks_.empty() && !busy_; });
}

void Stream::run() {
    prctl(PR_SET_TIMERSLACK, 1UL);
    Time clock{};
    std::unique_lock lock(mutex_);
    while (true) {
        work_.wait(lock, [&] { return !tasks_.empty() || closing_; });
        if (tasks_.empty()) return;
        const Time enqueued = tasks_.front().first;
        Work work = std::move(tasks_.front().second);
        tasks_.pop_front();
        busy_ = true;
        lock.unlock();
        clock = std::max(clock, enqueued);
        const uint64_t most = settings().max_delay_ns;
        if (most > 0 && random_() % 2 == 0) {
            clock += std::chrono::nanoseconds(random_() % most);
            std::this_thread::sleep_until(clock);
        }
        clock = work({enqueued, clock, random_, priority});
        work = nullptr;
        lock.lock();
        busy_ = false;
        idle_.notify_all();
    }
}

Stream& stream_of(Handle stream) {
    if (stream != nullptr) return *static_cast<StreamHandle*>(stream)->stream;
    static const auto* const defaults = [] {
        auto* const streams = new std::vector<std::shared_ptr<Stream>>;
        for (int device = 0; device < kMaxDevices; ++device) {
            streams->push_back(Stream::start(0, device));
        }
        return streams;
    }();
    return *(*defaults)[static_cast<size_t>(current_device())];
}

void release_hung_events() {
    captures_ended = 0;
    hang_next = false;
    const std::lock_guard lock(hang().mutex);
    ++hang().resets;
    hang().changed.notify_all();
}

// What lives in a broken context ends with it, whatever the call returns.
static bool ends_broken() {
    return current_device() >= 0 && is_broken(current_device());
}

static Result enqueue_copy(const Part& part, int direction, Handle handle) {
    Stream& stream = stream_of(handle);
    if (stream.device != current_device()) return kInvalidHandle;
    if (!copyable(part, direction, stream.device)) return kInvalidValue;
    if (part.nbytes == 0) return kSuccess;
    stream.push([part, direction, device = stream.device](const Stream::Turn& turn) {
        return cross_link({part}, {direction, device, turn.priority, turn.enqueued, turn.ready,
                                   turn.random() % 2 == 0});
    });
    return kSuccess;
}

}  // namespace fake

using namespace fake;

FAKE_CALL(cuStreamCreateWithPriority, kContext, (Handle * stream, unsigned flags, int priority)) {
    FAKE_ENTER(cuStreamCreateWithPriority);
    if (flags != 1) return kInvalidValue;  // non-blocking
    *stream = new StreamHandle{Stream::start(std::clamp(priority, -5, 0), current_device())};
    ++live_streams;
    return kSuccess;
}

FAKE_CALL(cuStreamDestroy_v2, kContext, (Handle stream)) {
    const Result entered = call_cuStreamDestroy_v2.enter();
    if (entered != kSuccess && !ends_broken()) return entered;
    if (stream == nullptr) return kInvalidHandle;
    stream_of(stream).close();  // its thread ends when its work is done
    delete static_cast<StreamHandle*>(stream);
    --live_streams;
    return entered;
}

FAKE_CALL(cuStreamQuery, kContext, (Handle stream)) {
    FAKE_ENTER(cuStreamQuery);
    return stream_of(stream).idle() ? kSuccess : kNotReady;
}

FAKE_CALL(cuStreamSynchronize, kContext, (Handle stream)) {
    FAKE_ENTER(cuStreamSynchronize);
    stream_of(stream).wait_idle();
    return kSuccess;
}

FAKE_CALL(cuStreamWaitEvent, kContext, (Handle stream, Handle event, unsigned)) {
    FAKE_ENTER(cuStreamWaitEvent);
    if (event == nullptr) return kInvalidHandle;
    auto generation = static_cast<Event*>(event)->get();
    if (generation == nullptr) return kSuccess;
    stream_of(stream).push([generation](const Stream::Turn& turn) {
        return std::max(turn.ready, generation->wait());
    });
    return kSuccess;
}

FAKE_CALL(cuEventCreate, kContext, (Handle * event, unsigned flags)) {
    FAKE_ENTER(cuEventCreate);
    if (flags != 2) return kInvalidValue;  // without timing, and nobody sleeps until it is reached
    *event = new Event{current_device(), {}, {}};
    ++live_events;
    return kSuccess;
}

FAKE_CALL(cuEventDestroy_v2, kContext, (Handle event)) {
    const Result entered = call_cuEventDestroy_v2.enter();
    if (entered != kSuccess && !ends_broken()) return entered;
    if (event == nullptr) return kInvalidHandle;
    delete static_cast<Event*>(event);
    --live_events;
    return entered;
}

FAKE_CALL(cuEventRecord, kContext, (Handle event, Handle stream)) {
    FAKE_ENTER(cuEventRecord);
    if (event == nullptr) return kInvalidHandle;
    auto generation = std::make_shared<Generation>();
    const bool hangs = hang_next.exchange(false);
    auto* recorded = static_cast<Event*>(event);
    const int device = stream_of(stream).device;
    if (recorded->device != device || current_device() != device) return kInvalidHandle;
    // One lock over both: the newest generation is the one enqueued last.
    const std::lock_guard lock(recorded->mutex);
    recorded->newest = generation;
    stream_of(stream).push([generation, hangs](const Stream::Turn& turn) {
        if (hangs) hang_until_reset();
        generation->complete(turn.ready);
        return turn.ready;
    });
    return kSuccess;
}

FAKE_CALL(cuThreadExchangeStreamCaptureMode, kNothing, (int* mode)) {
    FAKE_ENTER(cuThreadExchangeStreamCaptureMode);
    std::swap(*mode, capture_mode);
    return kSuccess;
}

FAKE_CALL(cuEventQuery, kContext, (Handle event)) {
    FAKE_ENTER(cuEventQuery);
    if (settings().capturing != 0 && capture_mode != kCaptureRelaxed) {
        ++captures_ended;
        return kCaptureUnsupported;
    }
    auto generation = static_cast<Event*>(event)->get();
    return generation == nullptr || generation->is_done() ? kSuccess : kNotReady;
}

FAKE_CALL(cuEventSynchronize, kContext, (Handle event)) {
    FAKE_ENTER(cuEventSynchronize);
    auto generation = static_cast<Event*>(event)->get();
    if (generation != nullptr) generation->wait();
    return kSuccess;
}

FAKE_CALL(cuMemcpyHtoDAsync_v2, kContext,
          (DevicePointer device, const void* host, size_t nbytes, Handle stream)) {
    FAKE_ENTER(cuMemcpyHtoDAsync_v2);
    return enqueue_copy({reinterpret_cast<uint64_t>(host), device, nbytes}, FAKE_CUDA_TO_DEVICE,
                        stream);
}

FAKE_CALL(cuMemcpyDtoHAsync_v2, kContext,
          (void* host, DevicePointer device, size_t nbytes, Handle stream)) {
    FAKE_ENTER(cuMemcpyDtoHAsync_v2);
    return enqueue_copy({device, reinterpret_cast<uint64_t>(host), nbytes}, FAKE_CUDA_TO_HOST,
                        stream);
}

FAKE_CALL(cuLaunchHostFunc, kContext, (Handle stream, void (*function)(void*), void* data)) {
    FAKE_ENTER(cuLaunchHostFunc);
    stream_of(stream).push([function, data](const Stream::Turn&) {
        function(data);
        return Clock::now();
    });
    return kSuccess;
}

FAKE_CALL(cuModuleLoadData, kContext, (Handle * module, const void*)) {
    FAKE_ENTER(cuModuleLoadData);
    *module = &module_handle;
    return kSuccess;
}

FAKE_CALL(cuModuleUnload, kContext, (Handle)) {
    FAKE_ENTER(cuModuleUnload);
    return kSuccess;
}

FAKE_CALL(cuModuleGetFunction, kContext, (Handle * function, Handle, const char* name)) {
    FAKE_ENTER(cuModuleGetFunction);
    if (std::string(name) != "moeinf_gather") return kNotFound;
    *function = &gather_handle;
    return kSuccess;
}

FAKE_CALL(cuLaunchKernel, kContext,
          (Handle function, unsigned, unsigned grid_y, unsigned, unsigned, unsigned, unsigned,
           unsigned, Handle stream, void** parameters, void**)) {
    FAKE_ENTER(cuLaunchKernel);
    const int device = stream_of(stream).device;
    if (function != &gather_handle || device != current_device()) return kInvalidHandle;
    stream_of(stream).push(
        [parts = gather_parts(parameters, grid_y), device](const Stream::Turn& turn) {
            for (const Part& part : parts) {
                if ((part.source | part.target | part.nbytes) % 16 != 0) {
                    break_context(device, kMisalignedAddress,
                                  "a gather's part is not aligned to 16 bytes");
                    return turn.ready;
                }
            }
            return cross_link(parts, {FAKE_CUDA_TO_DEVICE, device, turn.priority, turn.enqueued,
                                      turn.ready, turn.random() % 2 == 0});
        });
    return kSuccess;
}

FAKE_EXPORT uint64_t fake_cuda_captures_ended(void) {
    return captures_ended;
}

FAKE_EXPORT void fake_cuda_hang_next_event(void) {
    hang_next = true;
}

FAKE_EXPORT uint64_t fake_cuda_live_streams(void) {
    return live_streams;
}

FAKE_EXPORT uint64_t fake_cuda_live_events(void) {
    return live_events;
}
