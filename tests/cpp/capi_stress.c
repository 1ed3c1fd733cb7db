/* Eight threads call the C interface at random over shared handles, and check every byte of every
 * expert they get: capi_stress [CALLS [SEED]]. Some calls are wrong on purpose. The sanitizers run
 * it, see sanitize.sh. */
#include <moeinf.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { THREADS = 8, LAYERS = 3, EXPERTS = 16, SEGMENTS = 2, MOST = 6 };
static const moeinf_segment SEGMENT[SEGMENTS] = {{0, 700}, {1024, 300}};

static moeinf_store* store;
static moeinf_cache* cache;
static long calls_each = 20000 / THREADS;
static uint64_t seed;

/* Threads of the cache and of the test share a lock for this one number. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long failures = 0;

static void fail(const char* what) {
    pthread_mutex_lock(&lock);
    if (failures++ < 10) fprintf(stderr, "%s: %s\n", what, moeinf_last_error());
    pthread_mutex_unlock(&lock);
}

static uint64_t next(uint64_t* state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static unsigned char byte_at(int32_t layer, int32_t expert, int32_t segment, uint64_t i) {
    return (unsigned char)(layer * 97 + expert * 31 + segment * 7 + (int32_t)(i * 13));
}

static int64_t read_expert(void* user, int32_t layer, int32_t expert, int32_t segment, void* out,
                           uint64_t nbytes) {
    (void)user;
    for (uint64_t i = 0; i < nbytes; ++i) {
        ((unsigned char*)out)[i] = byte_at(layer, expert, segment, i);
    }
    return (int64_t)nbytes;
}

static void check_bytes(int32_t layer, int32_t expert, const unsigned char* slot) {
    for (int32_t segment = 0; segment < SEGMENTS; ++segment) {
        for (uint64_t i = 0; i < SEGMENT[segment].nbytes; i += 37) {
            if (slot[SEGMENT[segment].slot_offset + i] != byte_at(layer, expert, segment, i)) {
                fail("wrong byte");
                return;
            }
        }
    }
}

static void make_step(moeinf_step* step, int32_t* experts, uint64_t* random) {
    MOEINF_INIT(*step);
    step->layer = (int32_t)(next(random) % LAYERS);
    step->num_experts = 1 + (int32_t)(next(random) % MOST);
    const int32_t first = (int32_t)(next(random) % EXPERTS);
    for (int32_t i = 0; i < step->num_experts; ++i) experts[i] = (first + 5 * i) % EXPERTS;
    step->experts = experts;
    step->prefill = next(random) % 4 == 0;
}

/* Returns how many calls it made. */
static long acquire_all(uint64_t* random) {
    int32_t experts[MOST];
    moeinf_ready ready[MOST];
    moeinf_step step;
    make_step(&step, experts, random);
    moeinf_lease* lease;
    if (moeinf_acquire(cache, &step, ready, &lease) != MOEINF_OK) {
        fail("acquire");
        return 1;
    }
    for (int32_t i = 0; i < step.num_experts; ++i) {
        check_bytes(step.layer, experts[i], ready[i].address);
    }
    if (moeinf_lease_release(lease, NULL) != MOEINF_OK) fail("release");
    if (moeinf_lease_release(lease, NULL) != MOEINF_INVALID) fail("a lease was released twice");
    return 3;
}

static long in_waves(uint64_t* random) {
    int32_t experts[MOST], count = 0, left = 0;
    moeinf_ready ready[MOST];
    moeinf_step step;
    make_step(&step, experts, random);
    moeinf_lease* lease;
    long calls = 1;
    if (moeinf_begin(cache, &step, &lease) != MOEINF_OK) {
        fail("begin");
        return calls;
    }
    const int give_up = next(random) % 8 == 0;
    do {
        const int waits = next(random) % 2 == 0;
        ++calls;
        if ((waits ? moeinf_lease_wait : moeinf_lease_try)(lease, ready, &count, &left) !=
            MOEINF_OK) {
            fail("wait");
            break;
        }
        for (int32_t i = 0; i < count; ++i) {
            check_bytes(step.layer, experts[ready[i].position], ready[i].address);
            if (moeinf_lease_release_one(lease, ready[i].position, NULL) != MOEINF_OK) {
                fail("release one");
            }
            ++calls;
        }
    } while (left > 0 && !give_up);
    if (moeinf_lease_release(lease, NULL) != MOEINF_OK) fail("release");
    return calls + 1;
}

static long small_call(uint64_t* random) {
    int32_t experts[MOST];
    moeinf_step step;
    make_step(&step, experts, random);
    moeinf_stats stats;
    MOEINF_INIT(stats);
    switch (next(random) % 6) {
        case 0:
            if (moeinf_cache_get_stats(cache, -1, &stats) != MOEINF_OK) fail("stats");
            return 1;
        case 1:
            if (moeinf_cache_resize(cache, 8 + (int32_t)(next(random) % 9)) != MOEINF_OK) {
                fail("resize");
            }
            return 1;
        case 2:
            if (moeinf_cache_destroy(cache) == MOEINF_OK) fail("destroyed while in use");
            return 1;
        case 3:
            if (moeinf_store_destroy(store) != MOEINF_IN_USE) fail("destroyed while in use");
            return 1;
        case 4:
            step.layer = LAYERS;
            if (moeinf_cache_prefetch(cache, step.layer, experts, 1, NULL) != MOEINF_INVALID) {
                fail("a bad layer");
            }
            return 1;
        default:
            if (moeinf_cache_prefetch(cache, step.layer, experts, step.num_experts, NULL) !=
                MOEINF_OK) {
                fail("prefetch");
            }
            return 1;
    }
}

static void* run(void* number) {
    uint64_t random = seed * 1000003u + (uint64_t)(size_t)number * 7919u + 1;
    for (long calls = 0; calls < calls_each;) {
        switch (next(&random) % 4) {
            case 0:
                calls += acquire_all(&random);
                break;
            case 1:
                calls += in_waves(&random);
                break;
            default:
                calls += small_call(&random);
        }
    }
    return NULL;
}

int main(int argc, char** argv) {
    const char* given = argc > 1 ? argv[1] : getenv("MOEINF_STRESS_CALLS");
    if (given != NULL) calls_each = atol(given) / THREADS;
    seed = argc > 2 ? (uint64_t)atoll(argv[2]) : (uint64_t)time(NULL);
    printf("capi_stress: %ld calls, seed %llu\n", calls_each * THREADS, (unsigned long long)seed);

    moeinf_store_options options;
    MOEINF_INIT(options);
    options.num_layers = LAYERS;
    options.num_experts = EXPERTS;
    options.num_segments = SEGMENTS;
    options.segments = SEGMENT;
    options.read = read_expert;
    moeinf_cache_options slots;
    MOEINF_INIT(slots);
    slots.slots = 8;
    slots.reader_threads = 2;
    if (moeinf_store_create(&options, &store) != MOEINF_OK ||
        moeinf_cache_create(store, &slots, &cache) != MOEINF_OK) {
        fail("create");
        return 1;
    }
    /* A lease keeps the cache in use, so that threads may try to destroy it. */
    const int32_t expert = 0;
    moeinf_step step;
    MOEINF_INIT(step);
    step.experts = &expert;
    step.num_experts = 1;
    moeinf_ready ready;
    moeinf_lease* lease;
    if (moeinf_acquire(cache, &step, &ready, &lease) != MOEINF_OK) fail("acquire");

    pthread_t threads[THREADS];
    for (size_t i = 0; i < THREADS; ++i) pthread_create(&threads[i], NULL, run, (void*)i);
    for (size_t i = 0; i < THREADS; ++i) pthread_join(threads[i], NULL);

    if (moeinf_lease_release(lease, NULL) != MOEINF_OK) fail("release");
    if (moeinf_cache_destroy(cache) != MOEINF_OK) fail("destroy the cache");
    if (moeinf_store_destroy(store) != MOEINF_OK) fail("destroy the store");
    return failures == 0 ? 0 : 1;
}
