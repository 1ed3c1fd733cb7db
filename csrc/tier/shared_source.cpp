#include "tier/shared_source.h"

#include <chrono>
#include <exception>
#include <utility>

#include "tier/tier.h"

namespace moeinf {
namespace {

// How often a fill asks whether another process has ended its read.
constexpr std::chrono::microseconds kAskEvery{500};

}  // namespace

SharedSource::SharedSource(Tier& tier, FileReaderOptions options,
                           std::shared_ptr<SharedSegment> segment)
    : FileSource(tier, options),
      segment_(std::move(segment)),
      worker_([this](const std::stop_token& stop) { work(stop); }) {}

SharedSource::~SharedSource() {
    worker_.request_stop();
    worker_.join();
    for (const FillPtr& fill : elsewhere_) tier_.end_fill(*fill, "the read was cancelled");
    stop_reading();  // while its callbacks still have this object
}

void SharedSource::start(const FillPtr& fill) noexcept {
    try {
        if (try_start(fill)) return;
        const std::lock_guard lock(mutex_);
        elsewhere_.push_back(fill);
        some_.notify_one();
    } catch (const std::exception& error) {
        tier_.end_fill(*fill, error.what());
    }
}

bool SharedSource::try_start(const FillPtr& fill) {
    if (!segment_->filled(fill->expert)) {
        if (!segment_->lock(fill->expert)) return false;
        if (!segment_->filled(fill->expert)) {
            FileSource::start(fill);
            return true;
        }
        segment_->unlock(fill->expert);
    }
    fill->moved_nothing = true;
    tier_.end_fill(*fill, {});
    return true;
}

void SharedSource::on_read(Fill& fill, const ReadJob& transfer) noexcept {
    if (transfer.state() == ReadState::kDone) segment_->mark_filled(fill.expert);
    segment_->unlock(fill.expert);
    FileSource::on_read(fill, transfer);
}

void SharedSource::work(const std::stop_token& stop) {
    std::vector<FillPtr> asked;
    while (!stop.stop_requested()) {
        {
            std::unique_lock lock(mutex_);
            if (!some_.wait(lock, stop, [this] { return !elsewhere_.empty(); })) return;
            asked.swap(elsewhere_);
        }
        {
            const std::lock_guard lock(issuing);
            for (const FillPtr& fill : asked) start(fill);  // back to elsewhere_ if still read
        }
        asked.clear();
        std::this_thread::sleep_for(kAskEvery);
    }
}

}  // namespace moeinf
