// Opens a CUDA device through the driver library, which is loaded at run time by name: one build
// serves machines with and without a GPU. Shares the device's primary context with torch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "device/device.h"

namespace moeinf {

// Throws Error(kUnsupported), saying what is missing, without a driver, with one that is too old,
// without a device, in a process forked since the driver was first used; Error(kInvalid) for an
// index out of range. `library` empty: $MOEINF_CUDA_DRIVER, else libcuda.so.1.
[[nodiscard]] std::shared_ptr<Device> open_cuda_device(int32_t index, std::string library = {});

}  // namespace moeinf
