// What fills the slots of a pool: from files, or from a tier below. The cache names experts and
// slots; how the bytes come is the transport's business.
#pragma once

#include <cstdint>

#include "transfer/file_reader.h"
#include "transfer/transfer.h"

namespace moeinf {

class Transport {
public:
    virtual ~Transport() = default;

    // The first five are called under the cache's lock and only take note: what they ask for
    // begins, at the latest, with flush(). kDone means that the slot may be handed out; on a device
    // its reader then waits for the slot's fences.
    [[nodiscard]] virtual TransferPtr submit(ExpertId expert, SlotId slot, Priority priority,
                                             TransferCallback done) = 0;
    virtual void promote(const TransferPtr& transfer) = 0;  // a prefetch becomes a demand
    // An expert has left the slot that it filled; kNone: the slot goes, too.
    virtual void left(ExpertId /*expert*/, SlotId /*slot*/) {}
    // Would its bytes be copied out of that slot?
    [[nodiscard]] virtual bool copies_out(ExpertId /*expert*/) { return false; }
    // Has something been noted, and not yet been begun?
    [[nodiscard]] virtual bool has_queued() const noexcept { return false; }

    // Never under the cache's lock. Never throws: what fails, fails as a transfer.
    virtual void flush() noexcept {}

    // Is nothing under way on slots from `first` on? Asked before their memory goes.
    [[nodiscard]] virtual bool idle(SlotId /*first*/) { return true; }

    // What reads the files in the end.
    [[nodiscard]] virtual const FileReader& files() const noexcept = 0;

    // Bytes that may stand before a demand that overtakes a prefetch.
    [[nodiscard]] virtual int64_t delay_bytes() const noexcept = 0;
};

}  // namespace moeinf
