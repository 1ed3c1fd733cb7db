// What the C interface promises about wrong calls. The library is used as a program in C uses it.
#include <moeinf.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "fake_cuda.h"
#include "scratch.h"

extern "C" {
int cuLaunchHostFunc(void* stream, void (*function)(void*), void* data);
int cuDevicePrimaryCtxRetain(void** context, int device);
int cuCtxPushCurrent_v2(void* context);
}

namespace {

constexpr int32_t kLayers = 2, kExperts = 4;
constexpr moeinf_segment kSegments[] = {{0, 5000}, {8192, 300}};

std::byte byte_of(int32_t layer, int32_t expert, int32_t segment, uint64_t i) {
    return static_cast<std::byte>(layer * 97 + expert * 31 + segment * 7 + static_cast<int>(i) * 3);
}

struct Source {
    std::atomic<int32_t> failing{-1};  // expert
    std::atomic<int64_t> answer{-7};
    std::atomic<int32_t> cut{0};  // calls for less than a segment
};

int64_t read(void* user, int32_t layer, int32_t expert, int32_t segment, void* out,
             uint64_t nbytes) {
    auto& source = *static_cast<Source*>(user);
    if (nbytes != kSegments[segment].nbytes) ++source.cut;
    if (expert == source.failing) return source.answer;
    for (uint64_t i = 0; i < nbytes; ++i) {
        static_cast<std::byte*>(out)[i] = byte_of(layer, expert, segment, i);
    }
    return static_cast<int64_t>(nbytes);
}

bool says(const char* part) {
    const bool found = std::string(moeinf_last_error()).find(part) != std::string::npos;
    if (!found) std::cerr << "said: " << moeinf_last_error() << "\n";
    return found;
}

moeinf_store_options store_options(Source& source) {
    moeinf_store_options options;
    MOEINF_INIT(options);
    options.num_layers = kLayers;
    options.num_experts = kExperts;
    options.num_segments = 2;
    options.segments = kSegments;
    options.read = read;
    options.user = &source;
    return options;
}

moeinf_step step_of(int32_t layer, const std::vector<int32_t>& experts) {
    moeinf_step step;
    MOEINF_INIT(step);
    step.layer = layer;
    step.experts = experts.data();
    step.num_experts = static_cast<int32_t>(experts.size());
    return step;
}

bool holds(const moeinf_ready& ready, int32_t layer, int32_t expert) {
    for (int32_t segment = 0; segment < 2; ++segment) {
        const auto* const bytes =
            static_cast<const std::byte*>(ready.address) + kSegments[segment].slot_offset;
        for (uint64_t i = 0; i < kSegments[segment].nbytes; ++i) {
            if (bytes[i] != byte_of(layer, expert, segment, i)) return false;
        }
    }
    return true;
}

// What a kernel on the default stream would see, when the stream reaches it.
struct Looks {
    std::atomic<int> seen{0}, wrong{0};

    void look_on_stream(const moeinf_ready& ready, int32_t layer, int32_t expert) {
        struct Look {
            Looks& looks;
            moeinf_ready ready;
            int32_t layer, expert;
        };
        const auto run = [](void* data) {
            const std::unique_ptr<Look> one(static_cast<Look*>(data));
            if (!holds(one->ready, one->layer, one->expert)) ++one->looks.wrong;
            ++one->looks.seen;
        };
        CHECK_EQ(cuLaunchHostFunc(nullptr, run, new Look{*this, ready, layer, expert}), 0);
    }
};

// A store by callback and a cache on it, destroyed in order.
struct World {
    Source source;
    moeinf_store* store = nullptr;
    moeinf_cache* cache = nullptr;

    explicit World(int32_t slots = 3, const char* device = nullptr) {
        const moeinf_store_options options = store_options(source);
        REQUIRE(moeinf_store_create(&options, &store) == MOEINF_OK);
        cache = add_cache(slots, device);
    }
    moeinf_cache* add_cache(int32_t slots, const char* device = nullptr) {
        moeinf_cache_options options;
        MOEINF_INIT(options);
        options.slots = slots;
        options.device = device;
        moeinf_cache* made = nullptr;
        if (moeinf_cache_create(store, &options, &made) != MOEINF_OK) {
            std::cerr << moeinf_last_error() << "\n";
        }
        REQUIRE(made != nullptr);
        return made;
    }
    ~World() {
        CHECK_EQ(moeinf_cache_destroy(cache), MOEINF_OK);
        CHECK_EQ(moeinf_store_destroy(store), MOEINF_OK);
    }
    moeinf_lease* acquire(int32_t layer, const std::vector<int32_t>& experts,
                          std::vector<moeinf_ready>& ready, moeinf_status wanted = MOEINF_OK) {
        const moeinf_step step = step_of(layer, experts);
        ready = std::vector<moeinf_ready>(experts.size());
        moeinf_lease* lease = nullptr;
        CHECK_EQ(moeinf_acquire(cache, &step, ready.data(), &lease), wanted);
        return lease;
    }
};

TEST("a struct of another version, or without its size, is refused") {
    Source source;
    moeinf_store* store = nullptr;
    moeinf_store_options options = store_options(source);
    options.api_version = MOEINF_API_VERSION + 1;
    CHECK_EQ(moeinf_store_create(&options, &store), MOEINF_UNSUPPORTED);
    CHECK(says("found 2: compile with the header"));
    options.api_version = 0;
    CHECK_EQ(moeinf_store_create(&options, &store), MOEINF_UNSUPPORTED);
    options = store_options(source);
    options.size = 0;
    CHECK_EQ(moeinf_store_create(&options, &store), MOEINF_INVALID);
    CHECK(says("begin with MOEINF_INIT"));
    CHECK_EQ(moeinf_store_open("nowhere", MOEINF_API_VERSION + 1, &store), MOEINF_UNSUPPORTED);
    CHECK(store == nullptr);
    CHECK_EQ(moeinf_api_version(), static_cast<uint32_t>(MOEINF_API_VERSION));
}

TEST("a struct may be shorter than the library's, or longer where the rest is zero") {
    World world;
    struct {
        moeinf_stats known;
        int64_t later;
    } stats;
    MOEINF_INIT(stats.known);
    stats.known.size = sizeof stats;
    stats.later = 42;
    CHECK_EQ(moeinf_cache_get_stats(world.cache, -1, &stats.known), MOEINF_OK);
    CHECK_EQ(stats.later, 42);
    moeinf_stats few;
    MOEINF_INIT(few);
    few.size = offsetof(moeinf_stats, hits);
    few.hits = -3;
    CHECK_EQ(moeinf_cache_get_stats(world.cache, -1, &few), MOEINF_OK);
    CHECK_EQ(few.hits, -3);

    struct {
        moeinf_cache_options known;
        int64_t later;
    } options;
    MOEINF_INIT(options.known);
    options.known.size = sizeof options;
    options.later = 1;
    moeinf_cache* cache = nullptr;
    CHECK_EQ(moeinf_cache_create(world.store, &options.known, &cache), MOEINF_INVALID);
    CHECK(says("a field that this library does not know"));
    options.later = 0;
    REQUIRE(moeinf_cache_create(world.store, &options.known, &cache) == MOEINF_OK);
    CHECK_EQ(moeinf_cache_destroy(cache), MOEINF_OK);
}

TEST("NULL is refused everywhere") {
    World world;
    moeinf_store* store = nullptr;
    moeinf_lease* lease = nullptr;
    moeinf_ready ready[4];
    int32_t count = 0;
    const std::vector<int32_t> experts{0};
    moeinf_step step = step_of(0, experts);
    const moeinf_store_options options = store_options(world.source);
    CHECK_EQ(moeinf_store_create(nullptr, &store), MOEINF_INVALID);
    CHECK_EQ(moeinf_store_create(&options, nullptr), MOEINF_INVALID);
    CHECK_EQ(moeinf_store_open(nullptr, MOEINF_API_VERSION, &store), MOEINF_INVALID);
    CHECK_EQ(moeinf_store_destroy(nullptr), MOEINF_INVALID);
    CHECK(says("expected a moeinf_store, found NULL"));
    CHECK_EQ(moeinf_store_get_info(world.store, nullptr), MOEINF_INVALID);
    CHECK_EQ(moeinf_cache_create(world.store, nullptr, &world.cache), MOEINF_INVALID);
    CHECK_EQ(moeinf_cache_destroy(nullptr), MOEINF_INVALID);
    CHECK_EQ(moeinf_cache_get_pool(nullptr, nullptr), MOEINF_INVALID);
    CHECK_EQ(moeinf_cache_resize(nullptr, 2), MOEINF_INVALID);
    CHECK_EQ(moeinf_cache_prefetch(world.cache, 0, nullptr, 1, nullptr), MOEINF_INVALID);
    CHECK_EQ(moeinf_cache_predict(world.cache, 0, nullptr, 1), MOEINF_INVALID);
    CHECK_EQ(moeinf_acquire(world.cache, nullptr, ready, &lease), MOEINF_INVALID);
    CHECK_EQ(moeinf_acquire(world.cache, &step, nullptr, &lease), MOEINF_INVALID);
    CHECK_EQ(moeinf_acquire(world.cache, &step, ready, nullptr), MOEINF_INVALID);
    CHECK_EQ(moeinf_acquire(nullptr, &step, ready, &lease), MOEINF_INVALID);
    CHECK_EQ(moeinf_begin(nullptr, &step, &lease), MOEINF_INVALID);
    step.experts = nullptr;
    CHECK_EQ(moeinf_begin(world.cache, &step, &lease), MOEINF_INVALID);
    CHECK_EQ(moeinf_lease_wait(nullptr, ready, &count, nullptr), MOEINF_INVALID);
    CHECK_EQ(moeinf_lease_try(nullptr, ready, &count, nullptr), MOEINF_INVALID);
    CHECK_EQ(moeinf_lease_use_on(nullptr, nullptr), MOEINF_INVALID);
    CHECK_EQ(moeinf_lease_release_one(nullptr, 0, nullptr), MOEINF_INVALID);
    CHECK_EQ(moeinf_lease_release(nullptr, nullptr), MOEINF_INVALID);
    CHECK_EQ(moeinf_engine_create(nullptr, nullptr), MOEINF_INVALID);
    CHECK_EQ(moeinf_engine_destroy(nullptr), MOEINF_INVALID);
    CHECK_EQ(moeinf_fused_experts(world.cache, nullptr, nullptr), MOEINF_INVALID);
    CHECK_EQ(moeinf_lease_compute(nullptr, nullptr, nullptr), MOEINF_INVALID);
}

TEST("a lease may be released on another thread, and only once") {
    World world;
    std::vector<moeinf_ready> ready;
    moeinf_lease* const lease = world.acquire(1, {2, 0}, ready);
    CHECK(holds(ready[0], 1, 2) && holds(ready[1], 1, 0));
    std::thread([&] { CHECK_EQ(moeinf_lease_release(lease, nullptr), MOEINF_OK); }).join();
    moeinf_lease* const next = world.acquire(0, {1}, ready);
    CHECK_EQ(moeinf_lease_release(lease, nullptr), MOEINF_INVALID);
    CHECK(says("a handle that is none or was given back"));
    CHECK(holds(ready[0], 0, 1));
    CHECK_EQ(moeinf_lease_release(next, nullptr), MOEINF_OK);
}

TEST("a position is released once, after it was handed out") {
    World world;
    const std::vector<int32_t> experts{0, 1};
    const moeinf_step step = step_of(0, experts);
    moeinf_lease* lease = nullptr;
    moeinf_ready ready[2];
    int32_t count = 0, left = 0;
    REQUIRE(moeinf_begin(world.cache, &step, &lease) == MOEINF_OK);
    CHECK_EQ(moeinf_lease_release_one(lease, 2, nullptr), MOEINF_INVALID);
    do {
        REQUIRE(moeinf_lease_wait(lease, ready, &count, &left) == MOEINF_OK);
        for (int32_t i = 0; i < count; ++i) {
            CHECK(holds(ready[i], 0, ready[i].position));
            CHECK_EQ(moeinf_lease_release_one(lease, ready[i].position, nullptr), MOEINF_OK);
            CHECK_EQ(moeinf_lease_release_one(lease, ready[i].position, nullptr), MOEINF_INVALID);
        }
    } while (left > 0);
    CHECK_EQ(moeinf_lease_try(lease, ready, &count, &left), MOEINF_OK);
    CHECK_EQ(count + left, 0);
    CHECK_EQ(moeinf_lease_release(lease, nullptr), MOEINF_OK);
}

TEST("a store is not destroyed under its caches, nor a cache under a lease") {
    World world;
    moeinf_cache* const other = world.add_cache(1);  // two caches on one store
    std::vector<moeinf_ready> ready;
    moeinf_lease* const lease = world.acquire(0, {0, 1, 2}, ready);
    CHECK_EQ(moeinf_store_destroy(world.store), MOEINF_IN_USE);
    CHECK(says("the moeinf_store is in use"));
    CHECK_EQ(moeinf_cache_destroy(world.cache), MOEINF_IN_USE);
    CHECK_EQ(moeinf_cache_destroy(other), MOEINF_OK);
    CHECK_EQ(moeinf_cache_destroy(other), MOEINF_INVALID);
    CHECK(holds(ready[2], 0, 2));
    CHECK_EQ(moeinf_lease_release(lease, nullptr), MOEINF_OK);
}

TEST("a read() that fails or writes short fails the step that wanted the expert, and no other") {
    World world;
    std::vector<moeinf_ready> ready;
    world.source.failing = 2;
    for (const int64_t answer : {-7, 4999}) {
        world.source.answer = answer;
        CHECK(world.acquire(1, {2}, ready, MOEINF_READ) == nullptr);
        CHECK(says("layer 1, expert 2, segment "));
        CHECK(says(("read() returned " + std::to_string(answer)).c_str()));
    }
    CHECK_EQ(moeinf_lease_release(world.acquire(1, {1, 3}, ready), nullptr), MOEINF_OK);
    world.source.failing = -1;
    CHECK_EQ(moeinf_lease_release(world.acquire(1, {2}, ready), nullptr), MOEINF_OK);
    CHECK_EQ(world.source.cut.load(), 0);
}

TEST("experts out of range, named twice or too many at once are refused") {
    World world;
    std::vector<moeinf_ready> ready;
    CHECK(world.acquire(kLayers, {0}, ready, MOEINF_INVALID) == nullptr);
    CHECK(world.acquire(0, {kExperts}, ready, MOEINF_INVALID) == nullptr);
    CHECK(world.acquire(0, {1, 1}, ready, MOEINF_INVALID) == nullptr);
    CHECK(world.acquire(0, {0, 1, 2, 3}, ready, MOEINF_CAPACITY) == nullptr);
    moeinf_cache_options options;
    MOEINF_INIT(options);
    options.policy = "best";
    moeinf_cache* cache = nullptr;
    CHECK_EQ(moeinf_cache_create(world.store, &options, &cache), MOEINF_INVALID);
    CHECK(says("'best'"));
}

TEST("a store reads the caller's memory in place") {
    std::vector<std::vector<std::byte>> bytes;
    std::vector<const void*> pointers;
    for (int32_t expert = 0; expert < kLayers * kExperts; ++expert) {
        for (int32_t segment = 0; segment < 2; ++segment) {
            auto& one = bytes.emplace_back(kSegments[segment].nbytes);
            for (uint64_t i = 0; i < one.size(); ++i) {
                one[i] = byte_of(expert / kExperts, expert % kExperts, segment, i);
            }
        }
    }
    for (const auto& one : bytes) pointers.push_back(one.data());
    Source none;
    moeinf_store_options options = store_options(none);
    moeinf_store* store = nullptr;
    options.pointers = pointers.data();
    CHECK_EQ(moeinf_store_create(&options, &store), MOEINF_INVALID);
    CHECK(says("one of places, pointers and read, found 2"));
    options.read = nullptr;
    World world;  // only for its acquire
    const auto own = std::pair(world.store, world.cache);
    REQUIRE(moeinf_store_create(&options, &world.store) == MOEINF_OK);
    world.cache = world.add_cache(0);
    std::vector<moeinf_ready> ready;
    moeinf_lease* const lease = world.acquire(1, {3, 0, 1, 2}, ready);
    for (size_t i = 0; i < 4; ++i) CHECK(holds(ready[i], 1, std::vector{3, 0, 1, 2}[i]));
    CHECK_EQ(moeinf_lease_release(lease, nullptr), MOEINF_OK);
    CHECK_EQ(moeinf_cache_destroy(world.cache), MOEINF_OK);
    CHECK_EQ(moeinf_store_destroy(world.store), MOEINF_OK);
    std::tie(world.store, world.cache) = own;
}

TEST("a store reads places of files, and refuses files that are too short") {
    ScratchFolder folder;
    std::vector<std::byte> content(77);
    std::vector<moeinf_place> places;
    for (int32_t expert = 0; expert < kLayers * kExperts; ++expert) {
        for (int32_t segment = 0; segment < 2; ++segment) {
            places.push_back({0, content.size()});
            for (uint64_t i = 0; i < kSegments[segment].nbytes; ++i) {
                content.push_back(byte_of(expert / kExperts, expert % kExperts, segment, i));
            }
        }
    }
    const std::string path = folder.write("experts", content);
    const char* const paths[] = {path.c_str()};
    Source none;
    moeinf_store_options options = store_options(none);
    options.read = nullptr;
    options.places = places.data();
    options.paths = paths;
    options.num_paths = 1;
    World world;
    const auto own = std::pair(world.store, world.cache);
    REQUIRE(moeinf_store_create(&options, &world.store) == MOEINF_OK);
    world.cache = world.add_cache(2);
    std::vector<moeinf_ready> ready;
    moeinf_lease* const lease = world.acquire(1, {3, 0}, ready);
    CHECK(holds(ready[0], 1, 3) && holds(ready[1], 1, 0));
    CHECK_EQ(moeinf_lease_release(lease, nullptr), MOEINF_OK);
    CHECK_EQ(moeinf_cache_destroy(world.cache), MOEINF_OK);
    CHECK_EQ(moeinf_store_destroy(world.store), MOEINF_OK);
    std::tie(world.store, world.cache) = own;

    content.pop_back();
    (void)folder.write("experts", content);
    moeinf_store* store = nullptr;
    CHECK_EQ(moeinf_store_create(&options, &store), MOEINF_INVALID);
    CHECK(says("leave the file"));
    const char* const missing[] = {"nowhere"};
    options.paths = missing;
    CHECK_EQ(moeinf_store_create(&options, &store), MOEINF_READ);
    CHECK(says("nowhere"));
    CHECK_EQ(moeinf_store_open("nowhere", MOEINF_API_VERSION, &store), MOEINF_READ);
    CHECK_EQ(moeinf_store_open(path.c_str(), MOEINF_API_VERSION, &store), MOEINF_READ);
    CHECK(says("expected a description"));
}

TEST("on a GPU the stream that reads waits for the bytes, and the next fill for the stream") {
    World world(2, "cuda:0");
    std::vector<moeinf_ready> ready;
    void* context = nullptr;
    REQUIRE(cuDevicePrimaryCtxRetain(&context, 0) == 0 && cuCtxPushCurrent_v2(context) == 0);
    fake_cuda_set_max_delay(300'000);
    Looks looks;
    for (int32_t round = 0; round < 60; ++round) {
        const int32_t expert = round * 3 % kExperts, layer = round % kLayers;
        moeinf_lease* const lease = world.acquire(layer, {expert}, ready);
        REQUIRE(lease != nullptr);
        CHECK_EQ(moeinf_lease_use_on(lease, nullptr), MOEINF_OK);
        looks.look_on_stream(ready[0], layer, expert);
        CHECK_EQ(round % 2 == 0 ? moeinf_lease_release(lease, nullptr)
                                : moeinf_lease_release_one(lease, 0, nullptr),
                 MOEINF_OK);
        if (round % 2 == 1) CHECK_EQ(moeinf_lease_release(lease, nullptr), MOEINF_OK);
    }
    for (int i = 0; i < 2000 && looks.seen < 60; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    CHECK_EQ(looks.seen.load(), 60);
    CHECK_EQ(looks.wrong.load(), 0);
    fake_cuda_reset(1);
    moeinf_cache_options options;
    MOEINF_INIT(options);
    options.device = "npu";
    moeinf_cache* cache = nullptr;
    CHECK_EQ(moeinf_cache_create(world.store, &options, &cache), MOEINF_INVALID);
    CHECK(says("expected cpu, cuda or cuda:N, found npu"));
}

}  // namespace

int main(int argc, char** argv) {
    return run_tests(argc, argv);
}
