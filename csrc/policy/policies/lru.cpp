// Least recently used. Age is the index of the step that used an expert last; it evicts the
// oldest, and of experts of one step the lower flat id.
#include "policy/policies/recency_lists.h"
#include "policy/policies/row.h"

namespace moeinf {
namespace {

class Lru final : public Policy {
public:
    explicit Lru(ModelShape shape) : residents_(shape.total(), 1) {}

    std::string_view name() const noexcept override { return "lru"; }

    void observe(const Step& step) override {
        now_ = step.index;
        for (const ExpertId expert : step.experts) {
            if (!residents_.contains(expert)) continue;  // inserted() will add it
            residents_.remove(expert);
            residents_.add(expert, 0, now_);
        }
    }

    size_t choose_victims(std::span<const ExpertId> /*residents*/, const Pins& pins,
                          std::span<ExpertId> victims) override {
        size_t found = 0;
        for (ExpertId expert = residents_.oldest(0); is_some(expert) && found < victims.size();
             expert = residents_.newer(expert)) {
            if (pins[expert] == 0) victims[found++] = expert;
        }
        return found;
    }

    // One that a prefetch brings in counts as used by the latest step.
    void inserted(ExpertId expert) override { residents_.add(expert, 0, now_); }
    void evicted(ExpertId expert) override { residents_.remove(expert); }

private:
    RecencyLists residents_;
    int64_t now_ = 0;
};

}  // namespace

namespace policies {
extern const PolicyRow lru = plain_policy<Lru>("lru");
}  // namespace policies

}  // namespace moeinf
