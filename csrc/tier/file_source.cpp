#include "tier/file_source.h"

#include <exception>

#include "tier/tier.h"

namespace moeinf {

FileSource::FileSource(Tier& tier, FileReaderOptions options)
    : Source(false), tier_(tier), reader_(std::make_unique<FileReader>(tier.catalog(), options)) {}

int64_t FileSource::delay_bytes() const noexcept {
    const FileReaderOptions& options = reader_->options();
    return static_cast<int64_t>(options.threads) * tier_.catalog()->num_places() *
           static_cast<int64_t>(options.chunk_bytes);
}

void FileSource::execute(std::span<const Command> commands) noexcept {
    for (const Command& command : commands) {
        if (command.kind == Command::Kind::kFill) {
            start(command.fill);
        } else if (command.fill->job != nullptr) {
            reader_->promote(std::static_pointer_cast<ReadJob>(command.fill->job));
        }
    }
}

void FileSource::start(const FillPtr& fill) noexcept {
    try {
        // The tier holds the fill until it has ended. A callback this small is not allocated.
        fill->job = reader_->submit(
            fill->expert, tier_.pool().slot(fill->slot), fill->priority,
            [this, fill = fill.get()](const ReadJobPtr& transfer) { on_read(*fill, *transfer); });
    } catch (const std::exception& error) {
        tier_.end_fill(*fill, error.what());
    }
}

void FileSource::on_read(Fill& fill, const ReadJob& transfer) noexcept {
    switch (transfer.state()) {
        case ReadState::kDone:
            return tier_.end_fill(fill, {});
        case ReadState::kFailed:
            return tier_.end_fill(fill, transfer.error());
        default:
            return tier_.end_fill(fill, "the read was cancelled");
    }
}

}  // namespace moeinf
