// How long a device takes for several equal runs of bytes from pinned RAM: by its copy engine, or
// gathered by one kernel. What the choice between the two is measured with.
#pragma once

#include <cstddef>
#include <memory>

#include "device/device.h"

namespace moeinf {

// Seconds for `count` runs of `nbytes`, host time included, the best of `rounds`. Throws
// Error(kInvalid) unless nbytes is a multiple of 16 above 0 and count is 1 to kMaxGatherParts.
[[nodiscard]] double time_copies(const std::shared_ptr<Device>& device, size_t nbytes, size_t count,
                                 bool gather, int32_t rounds);

}  // namespace moeinf
