// Opens a CUDA device through the driver library. The library is loaded by name at run time, so one
// build serves machines with and without a GPU. Shares the device's primary context with torch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "device/device.h"

namespace moeinf {

// Throws Error(kUnsupported) and names the reason: no driver, a driver that is too old, no device,
// or a process that was forked after the first use of the driver. Throws Error(kInvalid) for an
// index out of range. An empty `library` means $MOEINF_CUDA_DRIVER, or libcuda.so.1 without it.
[[nodiscard]] std::shared_ptr<Device> open_cuda_device(int32_t index, std::string library = {});

}  // namespace moeinf
