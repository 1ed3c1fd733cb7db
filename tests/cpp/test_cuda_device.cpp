// A CUDA device over the fake driver: errors without a device, arenas that grow, shrink and fail
// without loss, and the order of copies, which only events ensure.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "cuda/cuda.h"
#include "fake_cuda.h"

using moeinf::Arena;
using moeinf::Device;
using moeinf::Error;
using moeinf::ErrorCode;
using moeinf::Event;
using moeinf::open_cuda_device;
using moeinf::Stream;

namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr int kOutOfMemory = 2;
constexpr int kIllegalAddress = 700;

void check_fails(ErrorCode code, const std::string& said, const std::function<void()>& action) {
    try {
        action();
        std::cerr << "expected an error that says: " << said << "\n";
        ++failed_checks;
    } catch (const Error& error) {
        CHECK(error.code() == code);
        if (std::string(error.what()).find(said) == std::string::npos) {
            std::cerr << "expected '" << said << "' in: " << error.what() << "\n";
            ++failed_checks;
        }
    }
}

void fill(std::byte* data, size_t nbytes, unsigned seed) {
    for (size_t i = 0; i < nbytes; ++i) data[i] = std::byte((i * 31 + seed * 77 + i / 4096) & 0xff);
}

// A device on which every test begins afresh; nothing of one may be left behind.
struct World {
    explicit World(uint64_t seed = 1) {
        fake_cuda_reset(seed);
        device = open_cuda_device(0);
        stream = device->create_stream(false);
        done = device->create_event();
    }
    ~World() {
        finish(stream);
        device->destroy_event(done);
        device->destroy_stream(stream);
        device.reset();
        CHECK_EQ(fake_cuda_live_streams(), 0u);
        CHECK_EQ(fake_cuda_live_events(), 0u);
    }

    void finish(Stream which) const {
        device->record(done, which);
        device->synchronize(done);
        CHECK(device->finished(done));
    }

    std::unique_ptr<Arena> memory(size_t nbytes) const {
        auto arena = device->make_arena(nbytes);
        arena->commit(nbytes);
        return arena;
    }

    // Locked as one, unless in units.
    std::unique_ptr<Arena> pinned(size_t nbytes, size_t unit = 0) const {
        auto arena = device->make_pinned_arena(nbytes, unit == 0 ? nbytes : unit);
        arena->commit(nbytes);
        return arena;
    }

    std::shared_ptr<Device> device;
    Stream stream;
    Event done;
};

void what_is_missing_is_said() {
    check_fails(ErrorCode::kUnsupported, "no CUDA driver: cannot load libno_such_driver.so",
                [] { (void)open_cuda_device(0, "libno_such_driver.so"); });
    check_fails(ErrorCode::kUnsupported, "is too old: it has no cuInit",
                [] { (void)open_cuda_device(0, "libm.so.6"); });
    fake_cuda_set_driver_version(11010);
    check_fails(ErrorCode::kUnsupported, "it is for CUDA 11.1, expected 11.2 or newer",
                [] { (void)open_cuda_device(0); });
    fake_cuda_set_driver_version(11020);
    fake_cuda_set_device_count(0);
    check_fails(ErrorCode::kUnsupported, "finds no device", [] { (void)open_cuda_device(0); });
    fake_cuda_reset(1);
    fake_cuda_fail("cuInit", 1, 3);
    check_fails(ErrorCode::kUnsupported, "cuInit: CUDA_ERROR_NOT_INITIALIZED",
                [] { (void)open_cuda_device(0); });
    for (const int index : {-1, 1, 7}) {
        check_fails(ErrorCode::kInvalid, "device index from 0 to 0, found " + std::to_string(index),
                    [&] { (void)open_cuda_device(index); });
    }
}

void a_device_describes_itself() {
    const World world;
    CHECK(world.device->is_fake());
    CHECK_EQ(world.device->index(), 0);
    CHECK_EQ(world.device->name(), std::string("Fake CUDA device"));
    CHECK_EQ(world.device->total_bytes(), 1024 * kMiB);
    CHECK_EQ(world.device->free_bytes(), 1024 * kMiB);
}

void bytes_survive_the_round_trip_and_a_resize() {
    const World world;
    const size_t big = 96 * kMiB + 4096;
    const size_t small = 5 * kMiB;
    auto device = world.device->make_arena(200 * kMiB);
    auto host = world.pinned(2 * small);
    std::byte* const address = device->data();
    fill(host->data(), small, 3);
    device->commit(small);
    world.device->copy_in(device->data(), host->data(), small, world.stream);
    world.finish(world.stream);
    for (const size_t size : {big, small, 7 * kMiB, small}) {
        device->commit(size);
        CHECK_EQ(device->committed(), size);
        CHECK(device->data() == address);
        std::memset(host->data() + small, 0, small);
        world.device->copy_out(host->data() + small, device->data(), small, world.stream);
        world.finish(world.stream);
        CHECK(std::memcmp(host->data(), host->data() + small, small) == 0);
        // What a resize holds beyond what was asked for is less than one of its pieces.
        CHECK(fake_cuda_used_bytes() < size + 200 * kMiB / 32 + 2 * kMiB);
    }
    device->commit(0);
    CHECK_EQ(fake_cuda_used_bytes(), 0u);
    check_fails(ErrorCode::kCapacity, "cannot hold", [&] { device->commit(201 * kMiB); });
}

void a_growth_that_fails_changes_nothing() {
    const World world;
    const size_t nbytes = 8 * kMiB;
    auto device = world.device->make_arena(1024 * kMiB);
    auto host = world.pinned(2 * nbytes);
    fill(host->data(), nbytes, 5);
    device->commit(nbytes);
    world.device->copy_in(device->data(), host->data(), nbytes, world.stream);
    world.finish(world.stream);
    const uint64_t used = fake_cuda_used_bytes();
    const auto still_whole = [&] {
        CHECK_EQ(device->committed(), nbytes);
        CHECK_EQ(fake_cuda_used_bytes(), used);
        world.device->copy_out(host->data() + nbytes, device->data(), nbytes, world.stream);
        world.finish(world.stream);
        CHECK(std::memcmp(host->data(), host->data() + nbytes, nbytes) == 0);
    };
    // A growth by several pieces fails at each of the steps of its second piece.
    for (const char* step : {"cuMemCreate", "cuMemMap", "cuMemSetAccess"}) {
        fake_cuda_fail(step, 2, kOutOfMemory);
        check_fails(ErrorCode::kCapacity, "CUDA_ERROR_OUT_OF_MEMORY",
                    [&] { device->commit(256 * kMiB); });
        still_whole();
    }
    fake_cuda_set_memory(100 * kMiB);
    check_fails(ErrorCode::kCapacity, "bytes are free", [&] { device->commit(200 * kMiB); });
    still_whole();
    device->commit(64 * kMiB);
    CHECK_EQ(device->committed(), 64 * kMiB);
}

void pinned_memory_is_locked_in_whole_units() {
    const World world;
    const size_t unit = 3 * 4096;
    const size_t count = 200;
    auto device = world.memory(count * unit);
    auto host = world.device->make_pinned_arena(count * unit, unit);
    for (const size_t units : {size_t{1}, size_t{7}, count, size_t{150}, count}) {
        host->commit(units * unit);
        CHECK_EQ(host->committed(), units * unit);
        CHECK(fake_cuda_registered_bytes() >= units * unit);
        // Each unit is one copy: the fake refuses one that spans two registrations.
        for (size_t i = 0; i < units; ++i) {
            world.device->copy_in(device->data() + i * unit, host->data() + i * unit, unit,
                                  world.stream);
        }
        world.finish(world.stream);  // the next commit may take memory away
    }
    host->commit(0);
    CHECK_EQ(fake_cuda_registered_bytes(), 0u);
    check_fails(ErrorCode::kInvalid, "multiple of 4096",
                [&] { (void)world.device->make_pinned_arena(4096, 1000); });
}

void pinned_memory_refused_changes_nothing() {
    const World world;
    auto host = world.device->make_pinned_arena(64 * kMiB, 4096);
    host->commit(kMiB);
    fill(host->data(), kMiB, 9);
    std::vector<std::byte> before(host->data(), host->data() + kMiB);
    const uint64_t registered = fake_cuda_registered_bytes();
    fake_cuda_set_pinned_limit(10 * kMiB);
    check_fails(ErrorCode::kCapacity, "cannot page-lock", [&] { host->commit(32 * kMiB); });
    CHECK_EQ(host->committed(), kMiB);
    CHECK_EQ(fake_cuda_registered_bytes(), registered);
    CHECK(std::memcmp(before.data(), host->data(), kMiB) == 0);
    host->commit(8 * kMiB);
    CHECK_EQ(host->committed(), 8 * kMiB);
}

// One stream copies A in and later B over it, another copies out what A left. Returns whether the
// bytes that came out were A's, for each of many seeds.
int right_bytes(bool reader_waits, bool writer_waits, int seeds) {
    constexpr size_t kBytes = 64 << 10;
    int right = 0;
    for (int seed = 1; seed <= seeds; ++seed) {
        const World world(seed);
        fake_cuda_set_max_delay(300'000);
        auto device = world.memory(kBytes);
        auto host = world.pinned(3 * kBytes, kBytes);
        std::byte* const a = host->data();
        std::byte* const b = a + kBytes;
        std::byte* const seen = b + kBytes;
        fill(a, kBytes, 1);
        fill(b, kBytes, 2);
        const Stream reader = world.device->create_stream(true);
        const Event filled = world.device->create_event();
        const Event read = world.device->create_event();
        world.device->copy_in(device->data(), a, kBytes, world.stream);
        world.device->record(filled, world.stream);
        if (reader_waits) world.device->wait(reader, filled);
        world.device->copy_out(seen, device->data(), kBytes, reader);
        world.device->record(read, reader);
        if (writer_waits) world.device->wait(world.stream, read);
        world.device->copy_in(device->data(), b, kBytes, world.stream);
        // Recorded anew: what already waits is not disturbed.
        world.device->record(filled, world.stream);
        world.device->record(read, reader);
        world.finish(world.stream);
        world.finish(reader);
        right += std::memcmp(seen, a, kBytes) == 0;
        world.device->destroy_event(filled);
        world.device->destroy_event(read);
        world.device->destroy_stream(reader);
    }
    return right;
}

// Both waits are needed: with either of them taken out, some seed sees wrong bytes.
void events_order_copies_across_streams() {
    constexpr int kSeeds = 60;
    CHECK_EQ(right_bytes(true, true, kSeeds), kSeeds);
#ifndef __SANITIZE_THREAD__  // it would report the very races that are meant
    CHECK(right_bytes(false, true, kSeeds) < kSeeds);
    CHECK(right_bytes(true, false, kSeeds) < kSeeds);
#endif
}

void an_event_never_recorded_holds_nothing_up() {
    const World world;
    const Event never = world.device->create_event();
    CHECK(world.device->finished(never));
    world.device->wait(world.stream, never);
    world.finish(world.stream);
    world.device->destroy_event(never);
}

void an_event_that_hangs_is_not_finished() {
    const World world;
    const Event event = world.device->create_event();
    fake_cuda_hang_next_event();
    world.device->record(event, world.stream);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(!world.device->finished(event));
    fake_cuda_reset(1);
    world.device->synchronize(event);
    CHECK(world.device->finished(event));
    world.device->destroy_event(event);
}

void a_refused_copy_is_an_error_and_the_next_one_works() {
    const World world;
    auto device = world.memory(kMiB);
    auto host = world.pinned(kMiB);
    fake_cuda_fail("cuMemcpyHtoDAsync_v2", 2, kIllegalAddress);
    world.device->copy_in(device->data(), host->data(), kMiB, world.stream);
    check_fails(ErrorCode::kUnsupported, "cuMemcpyHtoDAsync: CUDA_ERROR_ILLEGAL_ADDRESS",
                [&] { world.device->copy_in(device->data(), host->data(), kMiB, world.stream); });
    world.device->copy_in(device->data(), host->data(), kMiB, world.stream);
    std::vector<std::byte> pageable(4096);
    auto reserved = world.device->make_arena(32 * kMiB);
    reserved->commit(kMiB);
    check_fails(ErrorCode::kUnsupported, "CUDA_ERROR_INVALID_VALUE", [&] {
        world.device->copy_in(device->data(), pageable.data(), 4096, world.stream);
    });
    check_fails(ErrorCode::kUnsupported, "CUDA_ERROR_INVALID_VALUE", [&] {
        world.device->copy_out(host->data(), reserved->data() + 16 * kMiB, 4096, world.stream);
    });
    world.finish(world.stream);
}

void a_gather_copies_what_copies_would(bool same_addresses) {
    const World world;
    fake_cuda_set_same_addresses(same_addresses ? 1 : 0);
    auto device_again = open_cuda_device(0);
    CHECK(device_again->can_gather());
    const size_t room = 64 << 10;
    auto device = world.memory(Device::kMaxGatherParts * room);
    auto host = world.pinned(2 * Device::kMaxGatherParts * room, room);
    fill(host->data(), Device::kMaxGatherParts * room, 4);
    std::vector<moeinf::GatherPart> parts;
    for (size_t i = 0; i < Device::kMaxGatherParts; ++i) {
        parts.push_back({host->data() + i * room, device->data() + i * room, 16 * (1 + i * 61)});
    }
    device_again->gather(parts, world.stream);
    std::byte* const seen = host->data() + Device::kMaxGatherParts * room;
    for (size_t i = 0; i < parts.size(); ++i) {
        world.device->copy_out(seen + i * room, parts[i].target, parts[i].nbytes, world.stream);
    }
    world.finish(world.stream);
    for (size_t i = 0; i < parts.size(); ++i) {
        CHECK(std::memcmp(seen + i * room, parts[i].source, parts[i].nbytes) == 0);
    }
    CHECK_EQ(fake_cuda_calls("cuLaunchKernel"), 1u);
    const std::vector<moeinf::GatherPart> odd{{host->data() + 8, device->data(), 16}};
    check_fails(ErrorCode::kInvalid, "multiples of 16",
                [&] { device_again->gather(odd, world.stream); });
    parts.push_back(parts[0]);
    check_fails(ErrorCode::kInvalid, "at most 64 parts to gather, found 65",
                [&] { device_again->gather(parts, world.stream); });
}

void the_default_stream_serves_too() {
    const World world;
    auto device = world.memory(kMiB);
    auto host = world.pinned(2 * kMiB, kMiB);
    fill(host->data(), kMiB, 6);
    world.device->copy_in(device->data(), host->data(), kMiB, nullptr);
    world.device->copy_out(host->data() + kMiB, device->data(), kMiB, nullptr);
    world.finish(nullptr);
    CHECK(std::memcmp(host->data(), host->data() + kMiB, kMiB) == 0);
}

// The fake's link: its time is the bytes' time, and an urgent copy goes before those that queue.
void the_link_is_shared_by_urgency() {
    const World world;
    constexpr size_t kChunk = 256 << 10;
    constexpr int kChunks = 16;
    fake_cuda_set_link(FAKE_CUDA_TO_DEVICE, 256e6, 10'000);
    auto device = world.memory(2 * kChunk);
    auto host = world.pinned(2 * kChunk, kChunk);
    const Stream urgent = world.device->create_stream(true);
    for (int i = 0; i < kChunks; ++i) {
        world.device->copy_in(device->data(), host->data(), kChunk, world.stream);
    }
    world.device->copy_in(device->data() + kChunk, host->data() + kChunk, kChunk, urgent);
    world.finish(urgent);
    world.finish(world.stream);
    const uint64_t each = 10'000 + uint64_t(kChunk / 256e6 * 1e9);
    CHECK_EQ(fake_cuda_bytes(FAKE_CUDA_TO_DEVICE), uint64_t{(kChunks + 1) * kChunk});
    CHECK_EQ(fake_cuda_busy_ns(FAKE_CUDA_TO_DEVICE), (kChunks + 1) * each);
    std::vector<fake_cuda_copy> copies(100);
    copies.resize(fake_cuda_copies(copies.data(), copies.size()));
    CHECK_EQ(copies.size(), size_t{kChunks + 1});
    const auto first = std::find_if(copies.begin(), copies.end(),
                                    [](const fake_cuda_copy& copy) { return copy.priority < 0; });
    CHECK(first != copies.end() && first + 1 != copies.end());  // enqueued last, it overtook
    for (size_t i = 1; i < copies.size(); ++i) CHECK(copies[i].start_ns >= copies[i - 1].end_ns);
    world.device->destroy_stream(urgent);
}

void any_thread_may_call() {
    const World world;
    auto device = world.memory(4 * kMiB);
    auto host = world.pinned(4 * kMiB, kMiB);
    std::vector<std::thread> threads;
    for (size_t i = 0; i < 4; ++i) {
        threads.emplace_back([&, i] {
            const Stream stream = world.device->create_stream(i % 2 == 0);
            const Event event = world.device->create_event();
            for (int round = 0; round < 50; ++round) {
                world.device->copy_in(device->data() + i * kMiB, host->data() + i * kMiB, 4096,
                                      stream);
                world.device->record(event, stream);
                world.device->synchronize(event);
            }
            world.device->destroy_event(event);
            world.device->destroy_stream(stream);
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK_EQ(fake_cuda_bytes(FAKE_CUDA_TO_DEVICE), uint64_t{4 * 50 * 4096});
}

// The arenas outlive the device object, as tensors over them may.
void arenas_outlive_the_device() {
    fake_cuda_reset(1);
    auto device = open_cuda_device(0);
    auto memory = device->make_arena(kMiB);
    auto host = device->make_pinned_arena(kMiB, 4096);
    device.reset();
    memory->commit(kMiB);
    host->commit(kMiB);
    memory.reset();
    host.reset();
    CHECK_EQ(fake_cuda_used_bytes(), 0u);
    CHECK_EQ(fake_cuda_registered_bytes(), 0u);
}

void a_forked_process_is_told() {
    const World world;
    auto memory = world.memory(kMiB);
    auto host = world.pinned(kMiB);
    const pid_t child = fork();
    if (child == 0) {
        failed_checks = 0;
        const std::string said = "was forked from one that had used CUDA";
        check_fails(ErrorCode::kUnsupported, said, [] { (void)open_cuda_device(0); });
        check_fails(ErrorCode::kUnsupported, said, [&] { (void)world.device->free_bytes(); });
        check_fails(ErrorCode::kUnsupported, said, [&] {
            world.device->copy_in(memory->data(), host->data(), kMiB, world.stream);
        });
        // Destructors in the child leave the driver alone.
        memory.reset();
        host.reset();
        _exit(failed_checks);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    world.device->copy_in(memory->data(), host->data(), kMiB, world.stream);
    world.finish(world.stream);
}

// Left in flight on purpose, with every object alive: the process must end, and in time.
void exit_with_copies_in_flight() {
    fake_cuda_reset(1);
    static std::shared_ptr<Device> device;
    static std::unique_ptr<Arena> memory;
    static std::unique_ptr<Arena> host;
    static Stream stream;
    device = open_cuda_device(0);
    fake_cuda_set_link(FAKE_CUDA_TO_DEVICE, 1e6, 0);
    memory = device->make_arena(kMiB);
    memory->commit(kMiB);
    host = device->make_pinned_arena(kMiB, 4096);
    host->commit(kMiB);
    stream = device->create_stream(false);
    for (int i = 0; i < 100; ++i) device->copy_in(memory->data(), host->data(), 16384, stream);
}

}  // namespace

int main() {
    what_is_missing_is_said();
    a_device_describes_itself();
    bytes_survive_the_round_trip_and_a_resize();
    a_growth_that_fails_changes_nothing();
    pinned_memory_is_locked_in_whole_units();
    pinned_memory_refused_changes_nothing();
    events_order_copies_across_streams();
    an_event_never_recorded_holds_nothing_up();
    an_event_that_hangs_is_not_finished();
    a_refused_copy_is_an_error_and_the_next_one_works();
    a_gather_copies_what_copies_would(true);
    a_gather_copies_what_copies_would(false);
    the_default_stream_serves_too();
    the_link_is_shared_by_urgency();
    any_thread_may_call();
    arenas_outlive_the_device();
    a_forked_process_is_told();
    exit_with_copies_in_flight();
    return test_result();
}
