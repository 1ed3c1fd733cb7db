#include "probe/copy_timing.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/sizes.h"
#include "device/timeline.h"

namespace moeinf {
namespace {

using Clock = std::chrono::steady_clock;

void check(size_t nbytes, size_t count) {
    if (nbytes > 0 && nbytes % kGatherUnit == 0 && count > 0 && count <= Device::kMaxGatherParts) {
        return;
    }
    throw Error(ErrorCode::kInvalid, "expected 1 to " + std::to_string(Device::kMaxGatherParts) +
                                         " runs of a multiple of 16 bytes, found " +
                                         std::to_string(count) + " of " + std::to_string(nbytes));
}

}  // namespace

double time_copies(const std::shared_ptr<Device>& device, size_t nbytes, size_t count, bool gather,
                   int32_t rounds) {
    check(nbytes, count);
    const size_t slot = round_up(nbytes, kPage);
    const auto host = device->make_pinned_arena(count * slot, slot);
    const auto there = device->make_arena(count * slot);
    host->commit(count * slot);
    there->commit(count * slot);
    std::fill_n(host->data(), count * slot,
                std::byte{1});  // so all pages exist before the first copy
    std::vector<GatherPart> parts;
    for (size_t i = 0; i < count; ++i) {
        parts.push_back({host->data() + i * slot, there->data() + i * slot, nbytes});
    }
    Timeline timeline(device, device->create_stream(true), true);
    double best = std::numeric_limits<double>::infinity();
    for (int32_t round = 0; round < rounds; ++round) {
        const auto start = Clock::now();
        if (gather) {
            device->gather(parts, timeline.stream());
        } else {
            for (const GatherPart& part : parts) {
                device->copy_in(part.target, part.source, part.nbytes, timeline.stream());
            }
        }
        timeline.synchronize(timeline.signal());
        best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
    }
    return best;
}

}  // namespace moeinf
