#include "trace/belady.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace moeinf {
namespace {

constexpr int32_t kNever = std::numeric_limits<int32_t>::max();

class Belady final : public Policy {
public:
    explicit Belady(const TraceView& trace)
        : next_use_(static_cast<size_t>(trace.shape().total()), kNever) {
        // One pass forward: each use fills in the entry of the use before it.
        next_of_access_.reserve(trace.experts.size());
        std::vector<int64_t> last_access(next_use_.size(), -1);
        StepReader reader(trace);
        for (Step step; reader.next(step);) {
            for (const int32_t expert : step.experts) {
                int64_t& last = last_access[static_cast<size_t>(expert)];
                if (last >= 0) {
                    next_of_access_[static_cast<size_t>(last)] = static_cast<int32_t>(step.index);
                }
                last = static_cast<int64_t>(next_of_access_.size());
                next_of_access_.push_back(kNever);
            }
        }
    }

    std::string_view name() const noexcept override { return "belady"; }

    void observe(const Step& step) override {
        for (const int32_t expert : step.experts) {
            next_use_[static_cast<size_t>(expert)] = next_of_access_[accesses_seen_++];
        }
    }

    size_t choose_victims(std::span<const int32_t> residents, std::span<const uint32_t> pinned,
                          std::span<int32_t> victims) override {
        candidates_.clear();
        for (const int32_t expert : residents) {
            if (expert < 0 || pinned[static_cast<size_t>(expert)] != 0) continue;
            candidates_.emplace_back(-next_use_[static_cast<size_t>(expert)], expert);
        }
        const size_t found = std::min(victims.size(), candidates_.size());
        std::partial_sort(candidates_.begin(),
                          candidates_.begin() + static_cast<std::ptrdiff_t>(found),
                          candidates_.end());
        for (size_t i = 0; i < found; ++i) victims[i] = candidates_[i].second;
        return found;
    }

private:
    std::vector<int32_t> next_of_access_;  // step index, by access in order
    std::vector<int32_t> next_use_;        // step index, by flat expert
    size_t accesses_seen_ = 0;
    std::vector<std::pair<int32_t, int32_t>> candidates_;  // scratch: (-next use, expert)
};

}  // namespace

std::unique_ptr<Policy> make_belady(const TraceView& trace) {
    return std::make_unique<Belady>(trace);
}

}  // namespace moeinf
