// Times several equal copies from pinned RAM to a device, with its copy engine or with one gather
// kernel. `moeinf doctor` chooses between the two by this measurement.
#pragma once

#include <cstddef>
#include <memory>

#include "device/device.h"

namespace moeinf {

// Seconds for `count` copies of `nbytes`, with the host's time, the best of `rounds`. Throws
// Error(kInvalid) unless nbytes is a multiple of 16 above 0 and count is 1 to kMaxGatherParts.
[[nodiscard]] double time_copies(const std::shared_ptr<Device>& device, size_t nbytes, size_t count,
                                 bool gather, int32_t rounds);

}  // namespace moeinf
