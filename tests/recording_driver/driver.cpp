// A libcuda.so.1 for Triton's own launcher without a GPU. Modules load, kernels do not run, and the
// last launch is noted. Triton compiles its code against this library and calls it like the real
// one.
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

using Result = int;
constexpr int kMaxParameters = 64;

struct LastLaunch {
    uint64_t function;  // numbered in the order in which functions were asked for
    uint32_t grid[3], block[3], shared;
    uint64_t stream;
    uint64_t parameters[kMaxParameters];  // 8 bytes from where each begins
};

// The head of CUlaunchConfig.
struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    void* stream;
};

LastLaunch last;
int parameters_noted = 0;
uint64_t functions = 0;
int context, module;  // their addresses are the handles

int attribute_of_device(int attribute) {
    switch (attribute) {
        case 8:  // shared memory of a block
            return 48 << 10;
        case 10:  // threads of a warp
            return 32;
        case 12:  // registers of a block
        case 82:  // and of a multiprocessor
            return 65536;
        case 16:  // multiprocessors
            return 132;
        case 75:  // compute capability, major
            return 9;
        case 76:  // and minor
            return 0;
        case 81:  // shared memory of a multiprocessor
            return 228 << 10;
        case 97:  // shared memory that a block may ask for
            return 227 << 10;
        default:
            return 1;
    }
}

}  // namespace

#define CALL extern "C" __attribute__((visibility("default"))) Result

// Of the launches to come, notes that many parameters. Reading more than a kernel has is undefined.
extern "C" __attribute__((visibility("default"))) void recording_driver_note(int parameters) {
    parameters_noted = parameters < kMaxParameters ? parameters : kMaxParameters;
}

extern "C" __attribute__((visibility("default"))) void recording_driver_last(LastLaunch* copy) {
    *copy = last;
}

CALL cuInit(unsigned) {
    return 0;
}
CALL cuDriverGetVersion(int* version) {
    return *version = 13000, 0;
}
CALL cuGetErrorString(Result, const char** text) {
    return *text = "a call that the recording driver refused", 0;
}
CALL cuDeviceGetCount(int* count) {
    return *count = 1, 0;
}
CALL cuDeviceGet(int* device, int index) {
    return *device = index, 0;
}
CALL cuDeviceGetAttribute(int* value, int attribute, int) {
    return *value = attribute_of_device(attribute), 0;
}
CALL cuDevicePrimaryCtxRetain(void** handle, int) {
    return *handle = &context, 0;
}
CALL cuCtxGetCurrent(void** handle) {
    return *handle = &context, 0;
}
CALL cuCtxSetCurrent(void*) {
    return 0;
}
CALL cuCtxGetDevice(int* device) {
    return *device = 0, 0;
}
CALL cuCtxGetLimit(size_t* value, int) {
    return *value = 0, 0;
}
CALL cuCtxSetLimit(int, size_t) {
    return 0;
}
CALL cuModuleLoadData(void** handle, const void*) {
    return *handle = &module, 0;
}
CALL cuModuleUnload(void*) {
    return 0;
}
CALL cuModuleGetFunction(void** function, void*, const char*) {
    return *function = reinterpret_cast<void*>(++functions), 0;
}
CALL cuFuncGetAttribute(int* value, int attribute, void*) {
    return *value = attribute == 0 ? 1024 : 0, 0;  // 0: the most threads of a block
}
CALL cuFuncSetAttribute(void*, int, int) {
    return 0;
}
CALL cuFuncSetCacheConfig(void*, int) {
    return 0;
}
CALL cuPointerGetAttribute(void* value, int, uint64_t pointer) {
    return std::memcpy(value, &pointer, sizeof pointer), 0;
}
CALL cuStreamIsCapturing(void*, int* status) {
    return *status = 0, 0;
}
CALL cuOccupancyMaxActiveClusters(int* count, void*, const void*) {
    return *count = 1, 0;
}
CALL cuTensorMapEncodeTiled() {
    return 1;
}
CALL cuTensorMapEncodeIm2col() {
    return 1;
}
CALL cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void**) {
    if (parameters_noted == 0) return 0;
    last = {};
    last.function = reinterpret_cast<uint64_t>(function);
    std::memcpy(last.grid, config->grid, sizeof last.grid);
    std::memcpy(last.block, config->block, sizeof last.block);
    last.shared = config->shared;
    last.stream = reinterpret_cast<uint64_t>(config->stream);
    for (int i = 0; i < parameters_noted; ++i) {
        std::memcpy(&last.parameters[i], parameters[i], sizeof last.parameters[i]);
    }
    return 0;
}
CALL cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                    unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                    void* stream, void** parameters, void** extra) {
    const LaunchConfig config = {
        {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, stream};
    return cuLaunchKernelEx(&config, function, parameters, extra);
}
