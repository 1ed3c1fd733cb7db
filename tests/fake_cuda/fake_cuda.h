// Tests control the fake CUDA driver with these functions and ask what happened. They are plain C,
// so Python reaches them through ctypes. MOEINF_CUDA_DRIVER names the library that exports them.
//
// Like CUDA: streams run beside each other, and each in its own order. An event can be recorded
// again. One copy engine per direction serves all streams, urgent ones first. Device memory is
// counted in pieces, and reserved addresses without memory cannot be copied to. Stricter than CUDA:
// host memory must be registered, a copy must lie within one registration (CUDA copies pageable
// memory slowly), only non-blocking streams can be made, a stream is given work with its own
// context current, and a copy touches no memory of another device. Unlike CUDA: the default stream
// waits for no other stream.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { FAKE_CUDA_TO_DEVICE = 0, FAKE_CUDA_TO_HOST = 1 };

// Settings, faults and counters as at the start, and hung events complete. Streams, events and
// memory stay. `seed` draws the delays of streams made from now on.
void fake_cuda_reset(uint64_t seed);

void fake_cuda_set_memory(uint64_t total_bytes);  // of each device; at the start 1 GiB
void fake_cuda_set_device_memory(int device, uint64_t total_bytes);
void fake_cuda_set_granularity(uint64_t bytes);   // of device memory; at the start 2 MiB
void fake_cuda_set_pinned_limit(uint64_t bytes);  // at the start none
void fake_cuda_set_driver_version(int version);   // at the start 13000; 11010 is too old
void fake_cuda_set_device_count(int count);       // at most 8; at the start 1
void fake_cuda_set_same_addresses(int same);      // at the start 1: see attribute 91
// A copy takes latency + bytes / bandwidth; 0 bytes per second is a link without limit, as at the
// start.
void fake_cuda_set_link(int direction, double bytes_per_second, uint64_t latency_ns);
// What finds its stream idle is done by the thread that enqueues it, without delay: nobody waits
// and no other thread runs, so that the time of the host alone can be measured. At the start 0.
void fake_cuda_set_at_once(int at_once);
// Some thread captures a graph in the mode "global": cuEventQuery fails, and ends the capture, in
// every thread that has not said that captures are none of its business. At the start 0.
void fake_cuda_set_capturing(int capturing);
uint64_t fake_cuda_captures_ended(void);  // since the last reset
// Before each task of a stream passes a random time: none for half of them, else up to this.
void fake_cuda_set_max_delay(uint64_t ns);

// The nth next call (1: the next one) of a function, by exported name ("cuMemcpyHtoDAsync_v2"),
// does nothing and returns `result`. Returns 0, or -1 for an unknown name.
int fake_cuda_fail(const char* function, uint64_t nth, int result);
// Every later call that needs the context of this device returns `result`, until reset. Its copies
// move nothing any more.
void fake_cuda_break_device(int device, int result);
// The event recorded next never completes, nor does anything behind it in its stream, until reset.
void fake_cuda_hang_next_event(void);

// Since the last reset. `function` NULL: of all functions; an unknown name has 0 calls.
uint64_t fake_cuda_calls(const char* function);
uint64_t fake_cuda_bytes(int direction);  // moved, copies and gathers, of all devices
uint64_t fake_cuda_device_bytes(int device, int direction);
uint64_t fake_cuda_busy_ns(int direction);  // time the links were occupied
// Right now.
uint64_t fake_cuda_used_bytes(void);        // device memory created and not released
uint64_t fake_cuda_registered_bytes(void);  // page-locked host memory
uint64_t fake_cuda_live_streams(void);      // made and not destroyed
uint64_t fake_cuda_live_events(void);

struct fake_cuda_copy {
    uint64_t source, target, nbytes;
    int32_t direction, priority;             // of its stream; lower is more urgent
    uint64_t enqueued_ns, start_ns, end_ns;  // of the steady clock; start and end on the link
};
// The newest copies (at most 65536 are kept; a gather is one of all its bytes, with its first
// part's addresses), oldest first; returns how many were written.
uint64_t fake_cuda_copies(struct fake_cuda_copy* copies, uint64_t most);

#ifdef __cplusplus
}
#endif
