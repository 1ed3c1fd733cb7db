// What fills the rows of a pool: from files, or from a tier below. The cache names experts and
// rows; how the bytes come is the transport's business.
#pragma once

#include <cstdint>

#include "transfer/file_reader.h"
#include "transfer/transfer.h"

namespace moeinf {

class Transport {
public:
    virtual ~Transport() = default;

    // The first five are called under the cache's lock and only take note: what they ask for
    // begins, at the latest, with flush(). kDone means that the row may be handed out; on a device
    // its reader then waits for the row's fences.
    [[nodiscard]] virtual TransferPtr submit(int32_t flat_expert, int32_t row, Priority priority,
                                             TransferCallback done) = 0;
    virtual void promote(const TransferPtr& transfer) = 0;  // a prefetch becomes a demand
    // An expert has left the row that it filled; -1: the row goes, too.
    virtual void left(int32_t /*flat_expert*/, int32_t /*row*/) {}
    // Would its bytes be copied out of that row?
    [[nodiscard]] virtual bool copies_out(int32_t /*flat_expert*/) { return false; }
    // Has something been noted, and not yet been begun?
    [[nodiscard]] virtual bool has_queued() const noexcept { return false; }

    // Never under the cache's lock. Never throws: what fails, fails as a transfer.
    virtual void flush() noexcept {}

    // Is nothing under way on rows from `first_row` on? Asked before their memory goes.
    [[nodiscard]] virtual bool idle(int32_t /*first_row*/) { return true; }

    // What reads the files in the end.
    [[nodiscard]] virtual const FileReader& files() const noexcept = 0;

    // Bytes that may stand before a demand that overtakes a prefetch.
    [[nodiscard]] virtual int64_t delay_bytes() const noexcept = 0;
};

}  // namespace moeinf
