/* moeinf.h: an expert cache for Mixture-of-Experts models, for C99 and every language that calls C.
 *
 *   store   where the bytes of all experts come from: files, your memory, or a function of yours
 *   cache   slots of fast memory that hold some of the experts
 *   lease   the right to read the slots of one step; a slot with a lease is never overwritten
 *   engine  threads and kernels that compute experts on the CPU
 *
 * Handles. A handle is a name, never dereferenced. NULL, a handle that was destroyed and a lease
 * that was released are refused with MOEINF_INVALID. A store cannot be destroyed while a cache uses
 * it, nor a cache while a lease does: MOEINF_IN_USE. Once moeinf_store_destroy() has returned
 * MOEINF_OK, your memory and your function are not used any more.
 *
 * Threads. Every function may be called by any thread at any time. Calls that share a handle are
 * safe; calls with the same lease take turns. A lease may be released by another thread than the
 * one that acquired it. Nothing survives fork(): the child makes its own handles.
 *
 * Structs. Every struct that a caller fills in begins with its size and the version of this header.
 * MOEINF_INIT(x) sets both, and all other fields to zero, which is the usual value of each. A
 * library of a later version accepts structs of an earlier one.
 *
 * Errors. A function that returns moeinf_status changes no output unless it returns MOEINF_OK.
 * moeinf_last_error() says in one sentence what was wrong. No exception leaves the library. */
#ifndef MOEINF_H
#define MOEINF_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MOEINF_API_VERSION 1

/* As a statement: moeinf_cache_options options; MOEINF_INIT(options); */
#define MOEINF_INIT(object)                        \
    do {                                           \
        memset(&(object), 0, sizeof(object));      \
        (object).size = sizeof(object);            \
        (object).api_version = MOEINF_API_VERSION; \
    } while (0)

typedef enum moeinf_status {
    MOEINF_OK = 0,
    MOEINF_INVALID = 1,  /* an argument that can never work */
    MOEINF_READ = 2,     /* a file that is missing, short, changed or unreadable; a failed read() */
    MOEINF_CAPACITY = 3, /* more slots or memory than there are */
    MOEINF_UNSUPPORTED = 4, /* something that this machine or this build lacks */
    MOEINF_IN_USE = 5       /* a cache, a lease or a running call still uses the handle */
} moeinf_status;

typedef enum moeinf_dtype { MOEINF_BF16 = 0, MOEINF_F16 = 1, MOEINF_F32 = 2 } moeinf_dtype;

typedef struct moeinf_store moeinf_store;
typedef struct moeinf_cache moeinf_cache;
typedef struct moeinf_lease moeinf_lease;
typedef struct moeinf_engine moeinf_engine;

/* The version of the library's interface, and that of the package. Compare the first with
 * MOEINF_API_VERSION where the library is loaded at run time. */
uint32_t moeinf_api_version(void);
const char* moeinf_version(void);

/* The sentence of the last call of this thread that failed. Valid until the thread's next call. */
const char* moeinf_last_error(void);

/* ---- What an expert computes: down(gate function(gate(x), up(x))). ---- */

/* One matrix in a slot, `rows` outputs and `cols` inputs. Offsets are bytes from the start of the
 * slot, strides are bytes from one row to the next. `format` is a weight format that the CPU
 * computes: "bf16", "f16", "f32", "e4m3", "e2m1", "int8", "int4", "q4_k", ... An unknown name is
 * refused with a list of all. */
typedef struct moeinf_matrix {
    size_t size;
    uint32_t api_version;
    const char* format;
    int64_t rows, cols;
    uint64_t values_offset;
    int64_t values_stride;
    const char* scale_type; /* NULL: no scales; "f32", "bf16", "f16", "e8m0" or "e4m3" */
    uint64_t scales_offset;
    int64_t scales_stride;
    int64_t scale_rows, scale_cols; /* of a block that shares a scale; 0 columns: all */
    int32_t has_zeros;              /* zero points of 8 bits, one beside each scale */
    uint64_t zeros_offset;
    int64_t zeros_stride;
    int32_t has_multiplier; /* an f32 by which the whole matrix is multiplied */
    uint64_t multiplier_offset;
    const char* bias_dtype; /* NULL: no bias; "bf16", "f16" or "f32" */
    uint64_t bias_offset;
    int64_t bias_stride;
} moeinf_matrix;

typedef struct moeinf_expert {
    size_t size;
    uint32_t api_version;
    const char* function;   /* NULL: "glu"; also "plain" (no up), "swiglu_oai", ... */
    const char* activation; /* NULL: "silu" */
    double alpha;           /* 0: 1 */
    double limit;           /* 0: none */
    const moeinf_matrix *gate, *up, *down; /* gate and up [I, H], down [H, I] */
} moeinf_expert;

/* ---- Stores ---- */

/* A run of bytes that every expert has, and its place in a slot. */
typedef struct moeinf_segment {
    uint64_t slot_offset, nbytes;
} moeinf_segment;

/* Where a segment of one expert begins. */
typedef struct moeinf_place {
    uint32_t file; /* index into `paths` */
    uint64_t offset;
} moeinf_place;

/* Writes all `nbytes` bytes of a segment to `out` and returns their number; any other number is a
 * failed read. Threads of the cache call it, several at once. It may not call this library. */
typedef int64_t (*moeinf_read)(void* user, int32_t layer, int32_t expert, int32_t segment,
                               void* out, uint64_t nbytes);

/* Exactly one of `places` (with `paths`), `pointers` and `read` says where bytes come from.
 * `places` and `pointers` have an element for each [layer][expert][segment]. All arrays but the
 * bytes themselves are copied. */
typedef struct moeinf_store_options {
    size_t size;
    uint32_t api_version;
    int32_t num_layers, num_experts, num_segments; /* num_experts: of each layer */
    const moeinf_segment* segments;
    const char* const* paths;
    int32_t num_paths;
    const moeinf_place* places;
    const void* const* pointers; /* unchanged until the store is destroyed */
    moeinf_read read;
    void* user;
    const moeinf_expert* expert; /* NULL: the library never computes these experts */
} moeinf_store_options;

moeinf_status moeinf_store_create(const moeinf_store_options* options, moeinf_store** store);

/* Opens what ExpertStore.describe(path) of the Python package has written for a checkpoint. */
moeinf_status moeinf_store_open(const char* description, uint32_t api_version,
                                moeinf_store** store);

typedef struct moeinf_store_info {
    size_t size;
    uint32_t api_version;
    int32_t num_layers, num_experts;
    uint64_t slot_bytes;
    uint64_t expert_bytes;        /* read for each expert */
    int64_t hidden, intermediate; /* 0: the store does not say what an expert computes */
} moeinf_store_info;

moeinf_status moeinf_store_get_info(moeinf_store* store, moeinf_store_info* info);
moeinf_status moeinf_store_destroy(moeinf_store* store);

/* ---- Caches ---- */

typedef struct moeinf_cache_options {
    size_t size;
    uint32_t api_version;
    int32_t slots;              /* experts that fit at once; 0: all */
    const char* policy;         /* NULL: "learned"; with parameters: "decayed_lfu:keep=0.9" */
    const char* prefetch;       /* NULL: "off"; "previous", "transition", "external", ... */
    const char* device;         /* NULL: "cpu"; "cuda" or "cuda:N" */
    int32_t host_slots;         /* of the pinned RAM below a GPU; 0: all experts */
    int32_t exclusive;          /* an expert on the GPU need not sit in that RAM too */
    uint64_t gather_below;      /* experts of at most so many bytes go to the GPU by a kernel */
    int32_t reader_threads;     /* 0: the measured default */
    int32_t through_page_cache; /* not past it, with O_DIRECT */
    uint64_t chunk_bytes;       /* of one read; 0: the measured default */
    const char* shared;         /* NULL; the name of memory that processes share: all experts */
} moeinf_cache_options;

moeinf_status moeinf_cache_create(moeinf_store* store, const moeinf_cache_options* options,
                                  moeinf_cache** cache);
moeinf_status moeinf_cache_destroy(moeinf_cache* cache);

/* Slot i begins `i * slot_bytes` bytes behind `base`, in RAM or in the memory of the device. The
 * address never changes. */
typedef struct moeinf_pool {
    size_t size;
    uint32_t api_version;
    void* base;
    uint64_t slot_bytes;
    int32_t slots; /* that hold experts; two more are for experts that pass through */
} moeinf_pool;

moeinf_status moeinf_cache_get_pool(moeinf_cache* cache, moeinf_pool* pool);

/* Waits for leases on slots that go. */
moeinf_status moeinf_cache_resize(moeinf_cache* cache, int32_t slots);

/* Starts to read absent experts, best first. Never waits. `started` may be NULL. */
moeinf_status moeinf_cache_prefetch(moeinf_cache* cache, int32_t layer, const int32_t* experts,
                                    int32_t count, int32_t* started);

/* What the next step of `layer` is expected to use, best first, for prefetch "external": read
 * ahead where that pays. */
moeinf_status moeinf_cache_predict(moeinf_cache* cache, int32_t layer, const int32_t* experts,
                                   int32_t count);

typedef struct moeinf_stats {
    size_t size;
    uint32_t api_version;
    int64_t accesses, hits, misses, evictions;
    int64_t demand_bytes, prefetch_bytes, prefetch_useful_bytes, prefetch_wasted_bytes;
    double stall_seconds;
} moeinf_stats;

/* layer -1: the sum of all layers. */
moeinf_status moeinf_cache_get_stats(moeinf_cache* cache, int32_t layer, moeinf_stats* stats);
moeinf_status moeinf_cache_reset_stats(moeinf_cache* cache);

/* ---- Leases ---- */

/* The experts of one MoE layer that one forward pass needs, and what the pass is. */
typedef struct moeinf_step {
    size_t size;
    uint32_t api_version;
    int32_t layer;
    const int32_t* experts; /* distinct, counted within the layer */
    int32_t num_experts;
    const int32_t* counts; /* tokens routed to each; NULL: one each */
    int32_t prefill;       /* the pass reads a prompt */
    int32_t new_sequence;  /* the first step of a request */
    int64_t caller;        /* whose passes follow one another; 0: those of the calling thread */
} moeinf_step;

typedef struct moeinf_ready {
    int32_t position; /* index into moeinf_step.experts */
    int32_t slot;
    void* address;
} moeinf_ready;

/* Waits until all experts of the step are in slots together. `ready`, in the order of positions,
 * has room for all. MOEINF_CAPACITY where they do not fit together: then use moeinf_begin(). */
moeinf_status moeinf_acquire(moeinf_cache* cache, const moeinf_step* step, moeinf_ready* ready,
                             moeinf_lease** lease);

/* Starts the reads of a step and never waits. Its experts are handed out by the next two
 * functions, each exactly once, those already there first. Any number of experts passes through
 * any number of slots if each is released after use. */
moeinf_status moeinf_begin(moeinf_cache* cache, const moeinf_step* step, moeinf_lease** lease);

/* Hands out the experts that are ready: *count of them, into `ready` with room for all of the
 * step's. moeinf_lease_wait() waits for at least one and sets *count to 0 when all were handed
 * out; moeinf_lease_try() never waits. *left: experts that were not handed out yet. */
moeinf_status moeinf_lease_wait(moeinf_lease* lease, moeinf_ready* ready, int32_t* count,
                                int32_t* left);
moeinf_status moeinf_lease_try(moeinf_lease* lease, moeinf_ready* ready, int32_t* count,
                               int32_t* left);

/* On a GPU: work that is enqueued on `stream` after this call sees the bytes of every expert
 * handed out so far. `stream` is a CUstream or cudaStream_t; NULL is the default stream. */
moeinf_status moeinf_lease_use_on(moeinf_lease* lease, void* stream);

/* One expert's slot may be reused, on a GPU after the work that is now enqueued on `stream`. */
moeinf_status moeinf_lease_release_one(moeinf_lease* lease, int32_t position, void* stream);

/* All slots may be reused. Ends the lease, also one with reads in flight. A second call with the
 * handle is MOEINF_INVALID and harms no other lease. */
moeinf_status moeinf_lease_release(moeinf_lease* lease, void* stream);

/* ---- The experts on the CPU ---- */

typedef struct moeinf_engine_options {
    size_t size;
    uint32_t api_version;
    int32_t threads;     /* with the caller; 0: one for each CPU */
    const char* kernels; /* NULL: the best that this CPU has */
} moeinf_engine_options;

/* One engine serves a process. Calls from several threads take turns on its threads. */
moeinf_status moeinf_engine_create(const moeinf_engine_options* options, moeinf_engine** engine);
moeinf_status moeinf_engine_destroy(moeinf_engine* engine);

/* out[t] = sum over j of topk_weights[t][j] * expert(topk_ids[t][j])(hidden[t]). Contiguous arrays.
 * Id -1, or the number of experts, means no expert. */
typedef struct moeinf_ffn {
    size_t size;
    uint32_t api_version;
    int32_t layer;
    int64_t tokens;
    int32_t top_k;
    int32_t ids_are_int64; /* else int32 */
    moeinf_dtype hidden_dtype, topk_weights_dtype, out_dtype;
    const void* hidden;       /* [tokens, H] */
    const void* topk_ids;     /* [tokens, top_k] */
    const void* topk_weights; /* [tokens, top_k] */
    void* out;                /* [tokens, H] */
    int32_t prefill, new_sequence;
    int64_t caller; /* these three as in moeinf_step */
} moeinf_ffn;

/* Computes experts as they become ready, while the others are read. Slots in RAM only. */
moeinf_status moeinf_fused_experts(moeinf_cache* cache, moeinf_engine* engine,
                                   const moeinf_ffn* ffn);

/* The same over experts that a lease holds; what the ffn says of the pass is not used. */
moeinf_status moeinf_lease_compute(moeinf_lease* lease, moeinf_engine* engine,
                                   const moeinf_ffn* ffn);

#ifdef __cplusplus
}
#endif

#endif
