// One fill of a device's slot, as its link sees it; private to the link.
#pragma once

#include <memory>
#include <utility>

#include "tier/device_link.h"

namespace moeinf {

inline constexpr const char* kEnding = "the cache is being closed";

// The link's `issuing` guards all members but the constants.
struct DeviceLink::CopyJob final : FillWaiter {
    CopyJob(DeviceLink& the_link, FillPtr the_fill)
        : FillWaiter(&the_link, the_fill->expert),
          link(the_link),
          slot(the_fill->slot),
          fill(std::move(the_fill)),
          priority(fill->priority) {}

    void on_pinned(const PinnedExpert& pinned, const std::string& error) noexcept override;

    // Makes the stream wait for a demotion that still brings the bytes to RAM.
    void wait_for_source(Stream stream) const {
        if (source.behind) source.behind->wait_on(stream, source.point);
    }

    DeviceLink& link;
    const SlotId slot;
    FillPtr fill;  // null once it has ended
    Priority priority;
    PinnedExpert source;  // without bytes until they are in RAM
    size_t copied = 0;
    uint64_t last_chunk = 0;  // point of the prefetches' timeline, once all is enqueued
};

}  // namespace moeinf
