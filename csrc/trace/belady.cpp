#include "trace/belady.h"

#include <limits>

#include "policy/lowest_scores.h"

namespace moeinf {
namespace {

constexpr int32_t kNever = std::numeric_limits<int32_t>::max();

class Belady final : public Policy {
public:
    explicit Belady(const TraceView& trace) : next_use_(trace.shape().total(), kNever) {
        // One pass over the trace: each use writes the entry of the previous use.
        next_of_access_.reserve(trace.experts.size());
        PerExpert<int64_t> last_access(next_use_.size(), -1);
        StepReader reader(trace);
        for (Step step; reader.next(step);) {
            for (const ExpertId expert : step.experts) {
                int64_t& last = last_access[expert];
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
        for (const ExpertId expert : step.experts) {
            next_use_[expert] = next_of_access_[accesses_seen_++];
        }
    }

    size_t choose_victims(std::span<const ExpertId> residents, const Pins& pins,
                          std::span<ExpertId> victims) override {
        const auto score_of = [this](ExpertId expert) { return -next_use_[expert]; };
        return lowest_scores(residents, pins, score_of, candidates_, victims);
    }

private:
    std::vector<int32_t> next_of_access_;  // step index, by access in order
    PerExpert<int32_t> next_use_;          // step index
    size_t accesses_seen_ = 0;
    ScoredExperts<int32_t> candidates_;  // scratch
};

}  // namespace

std::unique_ptr<Policy> make_belady(const TraceView& trace) {
    return std::make_unique<Belady>(trace);
}

}  // namespace moeinf
