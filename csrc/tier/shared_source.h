// Fills slots that several processes share: each expert is read by one of them. A fill of an expert
// that another process is reading waits until it is filled, or until that process has ended.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <stop_token>
#include <thread>
#include <vector>

#include "tier/file_source.h"
#include "tier/shared_segment.h"

namespace moeinf {

class SharedSource final : public FileSource {
public:
    SharedSource(Tier& tier, FileReaderOptions options, std::shared_ptr<SharedSegment> segment);
    ~SharedSource() override;

private:
    void start(const FillPtr& fill) noexcept override;
    void on_read(Fill& fill, const ReadJob& transfer) noexcept override;
    // False: another process reads it.
    [[nodiscard]] bool try_start(const FillPtr& fill);
    void work(const std::stop_token& stop);

    const std::shared_ptr<SharedSegment> segment_;
    std::mutex mutex_;                // guards the next
    std::vector<FillPtr> elsewhere_;  // fills of experts that other processes read
    std::condition_variable_any some_;
    std::jthread worker_;  // last: it uses the members above
};

}  // namespace moeinf
