// Fills the slots of a tier in RAM by reads of the store's files.
#pragma once

#include <memory>
#include <span>

#include "tier/source.h"
#include "transfer/file_reader.h"

namespace moeinf {

class Tier;

class FileSource : public Source {
public:
    FileSource(Tier& tier, FileReaderOptions options);

    [[nodiscard]] const FileReader& files() const noexcept { return *reader_; }
    // The bytes of prefetches that a demand may have to wait for.
    [[nodiscard]] int64_t delay_bytes() const noexcept;

protected:
    virtual void start(const FillPtr& fill) noexcept;
    virtual void on_read(Fill& fill, const ReadJob& transfer) noexcept;
    void stop_reading() { reader_.reset(); }

    Tier& tier_;

private:
    void execute(std::span<const Command> commands) noexcept override;

    std::unique_ptr<FileReader> reader_;
};

}  // namespace moeinf
