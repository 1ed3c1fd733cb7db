// Slots in RAM, filled from files.
#pragma once

#include <memory>
#include <utility>

#include "memory/slot_pool.h"
#include "tier/transport.h"

namespace moeinf {

class FileTransport final : public Transport {
public:
    FileTransport(std::shared_ptr<const Catalog> catalog, std::shared_ptr<SlotPool> pool,
                  FileReaderOptions options)
        : pool_(std::move(pool)), engine_(std::move(catalog), options) {}

    TransferPtr submit(ExpertId expert, SlotId slot, Priority priority,
                       TransferCallback done) override {
        return engine_.submit(expert, pool_->slot(slot), priority, std::move(done));
    }
    void promote(const TransferPtr& transfer) override { engine_.promote(transfer); }
    const FileReader& files() const noexcept override { return engine_; }
    int64_t delay_bytes() const noexcept override {
        const FileReaderOptions& options = engine_.options();
        return static_cast<int64_t>(options.threads) * static_cast<int64_t>(options.chunk_bytes);
    }

private:
    const std::shared_ptr<SlotPool> pool_;
    FileReader engine_;
};

}  // namespace moeinf
