#include "context.h"

#include <unistd.h>

#include <cstring>

#include "fake.h"

namespace fake {
namespace {

struct Context {
    std::atomic<int> retained{0};
};

std::atomic<pid_t> initialized_by{0};
Context contexts[kMaxDevices];  // their addresses are the handles
thread_local std::vector<int> pushed;

int device_of(Handle context) {
    const auto* const found = static_cast<Context*>(context);
    const bool known = found >= contexts && found < contexts + kMaxDevices;
    return known ? static_cast<int>(found - contexts) : -1;
}

struct Words {
    Result result;
    const char* name;
    const char* text;
};

constexpr Words kWords[] = {
    {kSuccess, "CUDA_SUCCESS", "no error"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {kNoDevice, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {kNotFound, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {kNotReady, "CUDA_ERROR_NOT_READY", "device not ready"},
    {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {kAlreadyRegistered, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "already mapped"},
    {kNotRegistered, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "not registered"},
    {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "not during a capture"},
    {kMisalignedAddress, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
};

const Words* words_of(Result result) {
    for (const Words& words : kWords) {
        if (words.result == result) return &words;
    }
    return nullptr;
}

}  // namespace

bool initialized_here() {
    return initialized_by.load(std::memory_order_relaxed) == getpid();
}

int current_device() {
    if (pushed.empty()) return -1;
    const int device = pushed.back();
    return contexts[device].retained.load(std::memory_order_relaxed) > 0 ? device : -1;
}

}  // namespace fake

using namespace fake;

FAKE_CALL(cuDriverGetVersion, kNothing, (int* version)) {
    FAKE_ENTER(cuDriverGetVersion);
    *version = settings().version;
    return kSuccess;
}

FAKE_CALL(cuInit, kNothing, (unsigned)) {
    FAKE_ENTER(cuInit);
    if (settings().devices == 0) return kNoDevice;
    pid_t none = 0;
    if (!initialized_by.compare_exchange_strong(none, getpid()) && !initialized_here()) {
        return kNotInitialized;
    }
    return kSuccess;
}

FAKE_CALL(cuGetErrorName, kNothing, (Result result, const char** name)) {
    FAKE_ENTER(cuGetErrorName);
    const Words* words = words_of(result);
    *name = words != nullptr ? words->name : nullptr;
    return words != nullptr ? kSuccess : kInvalidValue;
}

FAKE_CALL(cuGetErrorString, kNothing, (Result result, const char** text)) {
    FAKE_ENTER(cuGetErrorString);
    const Words* words = words_of(result);
    *text = words != nullptr ? words->text : nullptr;
    return words != nullptr ? kSuccess : kInvalidValue;
}

FAKE_CALL(cuDeviceGetCount, kInit, (int* count)) {
    FAKE_ENTER(cuDeviceGetCount);
    *count = settings().devices;
    return kSuccess;
}

FAKE_CALL(cuDeviceGet, kInit, (int* device, int index)) {
    FAKE_ENTER(cuDeviceGet);
    if (index < 0 || index >= settings().devices) return kInvalidDevice;
    *device = index;
    return kSuccess;
}

FAKE_CALL(cuDeviceGetName, kInit, (char* name, int nbytes, int)) {
    FAKE_ENTER(cuDeviceGetName);
    std::strncpy(name, "Fake CUDA device", static_cast<size_t>(nbytes));
    return kSuccess;
}

FAKE_CALL(cuDeviceGetAttribute, kInit, (int* value, int attribute, int)) {
    FAKE_ENTER(cuDeviceGetAttribute);
    switch (attribute) {
        case 16:
            *value = 4;
            break;  // multiprocessors
        case 91:
            *value = settings().same_addresses;
            break;  // of registered host memory
        case 102:
            *value = 1;
            break;  // virtual memory management
        default:
            return kInvalidValue;
    }
    return kSuccess;
}

FAKE_CALL(cuDevicePrimaryCtxRetain, kInit, (Handle * handle, int device)) {
    FAKE_ENTER(cuDevicePrimaryCtxRetain);
    ++contexts[device].retained;
    *handle = &contexts[device];
    return kSuccess;
}

FAKE_CALL(cuDevicePrimaryCtxRelease_v2, kInit, (int device)) {
    FAKE_ENTER(cuDevicePrimaryCtxRelease_v2);
    --contexts[device].retained;
    return kSuccess;
}

FAKE_CALL(cuCtxPushCurrent_v2, kInit, (Handle handle)) {
    FAKE_ENTER(cuCtxPushCurrent_v2);
    const int device = device_of(handle);
    if (device < 0 || contexts[device].retained == 0) return kInvalidContext;
    pushed.push_back(device);
    return kSuccess;
}

FAKE_CALL(cuCtxPopCurrent_v2, kInit, (Handle * handle)) {
    FAKE_ENTER(cuCtxPopCurrent_v2);
    if (pushed.empty()) return kInvalidContext;
    *handle = &contexts[pushed.back()];
    pushed.pop_back();
    return kSuccess;
}

FAKE_CALL(cuCtxGetStreamPriorityRange, kContext, (int* least, int* greatest)) {
    FAKE_ENTER(cuCtxGetStreamPriorityRange);
    *least = 0;
    *greatest = -5;
    return kSuccess;
}
