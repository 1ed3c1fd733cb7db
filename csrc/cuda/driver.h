// The CUDA driver's functions, declared here and loaded by name at run time, so the build needs no
// part of CUDA. The table below pairs each member of Driver with the exported name of its function.
// Where cuda.h is found, driver_check.cpp compares every declaration with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace moeinf::cuda {

using Result = int;  // CUresult
using DeviceHandle = int;
using DevicePointer = unsigned long long;
using MemoryHandle = unsigned long long;
using Handle = void*;  // of a context, a stream, an event, a module or a function

// CUmemLocation, CUmemAllocationProp and CUmemAccessDesc.
struct MemoryLocation {
    int type;
    int id;
};

struct MemoryProperties {
    int type;
    int requested_handle_types;
    MemoryLocation location;
    void* win32_handle_metadata;
    unsigned char flags[8];
};

struct MemoryAccess {
    MemoryLocation location;
    int flags;
};

constexpr Result kSuccess = 0;
constexpr Result kNoDevice = 100;
constexpr Result kNotReady = 600;
constexpr int kOldestDriver =
    11020;  // CUDA 11.2; older ones have faults in mapping memory in pieces

constexpr int kCaptureRelaxed = 2;
constexpr int kAllocationPinned = 1;
constexpr int kLocationDevice = 1;
constexpr int kAccessReadWrite = 3;
constexpr int kGranularityMinimum = 0;
constexpr unsigned kRegisterPortable = 1;
constexpr unsigned kRegisterDeviceMap = 2;
constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventDisableTiming = 2;
constexpr int kAttributeMultiprocessors = 16;
constexpr int kAttributeVirtualMemory = 102;
constexpr int kAttributeHostPointersAreDevicePointers = 91;  // of registered memory

// member, exported name, parameters
#define MOEINF_DRIVER_FUNCTIONS(X)                                                                \
    X(init, cuInit, (unsigned flags))                                                             \
    X(driver_get_version, cuDriverGetVersion, (int* version))                                     \
    X(get_error_name, cuGetErrorName, (Result result, const char** name))                         \
    X(get_error_string, cuGetErrorString, (Result result, const char** words))                    \
    X(device_get_count, cuDeviceGetCount, (int* count))                                           \
    X(device_get, cuDeviceGet, (DeviceHandle * device, int index))                                \
    X(device_get_name, cuDeviceGetName, (char* name, int nbytes, DeviceHandle device))            \
    X(device_get_attribute, cuDeviceGetAttribute,                                                 \
      (int* value, int attribute, DeviceHandle device))                                           \
    X(primary_context_retain, cuDevicePrimaryCtxRetain, (Handle * context, DeviceHandle device))  \
    X(primary_context_release, cuDevicePrimaryCtxRelease_v2, (DeviceHandle device))               \
    X(context_push, cuCtxPushCurrent_v2, (Handle context))                                        \
    X(context_pop, cuCtxPopCurrent_v2, (Handle * context))                                        \
    X(stream_priority_range, cuCtxGetStreamPriorityRange, (int* least, int* greatest))            \
    X(mem_get_info, cuMemGetInfo_v2, (size_t* free, size_t* total))                               \
    X(mem_get_granularity, cuMemGetAllocationGranularity,                                         \
      (size_t* granularity, const MemoryProperties* properties, int option))                      \
    X(mem_address_reserve, cuMemAddressReserve,                                                   \
      (DevicePointer * pointer, size_t nbytes, size_t alignment, DevicePointer address,           \
       unsigned long long flags))                                                                 \
    X(mem_address_free, cuMemAddressFree, (DevicePointer pointer, size_t nbytes))                 \
    X(mem_create, cuMemCreate,                                                                    \
      (MemoryHandle * memory, size_t nbytes, const MemoryProperties* properties,                  \
       unsigned long long flags))                                                                 \
    X(mem_release, cuMemRelease, (MemoryHandle memory))                                           \
    X(mem_map, cuMemMap,                                                                          \
      (DevicePointer pointer, size_t nbytes, size_t offset, MemoryHandle memory,                  \
       unsigned long long flags))                                                                 \
    X(mem_unmap, cuMemUnmap, (DevicePointer pointer, size_t nbytes))                              \
    X(mem_set_access, cuMemSetAccess,                                                             \
      (DevicePointer pointer, size_t nbytes, const MemoryAccess* access, size_t count))           \
    X(host_register, cuMemHostRegister_v2, (void* host, size_t nbytes, unsigned flags))           \
    X(host_unregister, cuMemHostUnregister, (void* host))                                         \
    X(host_get_device_pointer, cuMemHostGetDevicePointer_v2,                                      \
      (DevicePointer * pointer, void* host, unsigned flags))                                      \
    X(stream_create, cuStreamCreateWithPriority, (Handle * stream, unsigned flags, int priority)) \
    X(stream_destroy, cuStreamDestroy_v2, (Handle stream))                                        \
    X(exchange_capture_mode, cuThreadExchangeStreamCaptureMode, (int* mode))                      \
    X(stream_wait_event, cuStreamWaitEvent, (Handle stream, Handle event, unsigned flags))        \
    X(event_create, cuEventCreate, (Handle * event, unsigned flags))                              \
    X(event_destroy, cuEventDestroy_v2, (Handle event))                                           \
    X(event_record, cuEventRecord, (Handle event, Handle stream))                                 \
    X(event_query, cuEventQuery, (Handle event))                                                  \
    X(event_synchronize, cuEventSynchronize, (Handle event))                                      \
    X(copy_host_to_device, cuMemcpyHtoDAsync_v2,                                                  \
      (DevicePointer device, const void* host, size_t nbytes, Handle stream))                     \
    X(copy_device_to_host, cuMemcpyDtoHAsync_v2,                                                  \
      (void* host, DevicePointer device, size_t nbytes, Handle stream))                           \
    X(module_load_data, cuModuleLoadData, (Handle * module, const void* image))                   \
    X(module_get_function, cuModuleGetFunction,                                                   \
      (Handle * function, Handle module, const char* name))                                       \
    X(module_unload, cuModuleUnload, (Handle module))                                             \
    X(launch_kernel, cuLaunchKernel,                                                              \
      (Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,      \
       unsigned block_y, unsigned block_z, unsigned shared_bytes, Handle stream,                  \
       void** parameters, void** extra))

struct Driver {
#define MOEINF_MEMBER(member, exported, parameters) Result(*member) parameters = nullptr;
    MOEINF_DRIVER_FUNCTIONS(MOEINF_MEMBER)
#undef MOEINF_MEMBER
    std::string library;
    bool is_fake = false;

    // Throws Error(kUnsupported) with the driver's name and words for `result`.
    void check(Result result, const char* call) const;
    [[nodiscard]] std::string words(Result result) const;
};

// Loads and initialises the driver. The library stays loaded until the process ends, because torch
// may use it too. Throws Error(kUnsupported) and names what is missing.
[[nodiscard]] std::shared_ptr<const Driver> load_driver(std::string library);

// True if this process was forked from one that had initialised the driver. The driver cannot be
// used after such a fork.
[[nodiscard]] bool forked_since_use() noexcept;
void check_not_forked();

}  // namespace moeinf::cuda
