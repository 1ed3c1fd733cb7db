// The paper's policy (MoE-Infinity, arXiv 2401.14361v3, section 5.2): evicts the minimum of
// (p + eps) * (1 - l / L) / row sum, p the predicted activation of an expert of layer l, so that
// early layers, which prefetching covers worst, are favoured.
//
// Chosen where the text is silent: the pass in progress (iEAM) is matched over its rows so far, and
// entries by the same rows; the kMatched nearest are summed; before anything can be matched, the
// request's own matrix so far stands in; ties go to the lower flat id.
#include "cache/eam.h"

#include <algorithm>
#include <utility>

#include "cache/policies/policies.h"

namespace moeinf {
namespace {

constexpr int32_t kMatched = 3;
constexpr float kEpsilon = 1e-6f;

class Eam final : public Policy {
public:
    Eam(EamCollection prefill, EamCollection decode)
        : shape_(decode.shape()),
          phases_{Phase(std::move(prefill)), Phase(std::move(decode))},
          predicted_(static_cast<size_t>(shape_.total())),
          scores_(predicted_.size()) {}

    std::string_view name() const noexcept override { return "eam"; }

    void observe(const Step& step) override {
        if (step.new_sequence) {
            for (Phase& phase : phases_) phase.finish_request();
        }
        Phase& phase = phases_[step.prefill ? 0 : 1];
        if (step.new_sequence || step.layer <= layer_) phase.match.restart();
        layer_ = step.layer;
        phase.add(step);
        phase.match.nearest(kMatched, phase.nearest);
        current_ = &phase;
        stale_ = stale_ || phase.nearest != matched_ || &phase != scored_ || matched_.empty();
    }

    size_t choose_victims(std::span<const int32_t> residents, std::span<const uint32_t> pinned,
                          std::span<int32_t> victims) override {
        if (stale_) score();
        candidates_.clear();
        for (const int32_t expert : residents) {
            if (expert < 0 || pinned[static_cast<size_t>(expert)] != 0) continue;
            candidates_.emplace_back(scores_[static_cast<size_t>(expert)], expert);
        }
        const size_t found = std::min(victims.size(), candidates_.size());
        std::partial_sort(candidates_.begin(),
                          candidates_.begin() + static_cast<std::ptrdiff_t>(found),
                          candidates_.end());
        for (size_t i = 0; i < found; ++i) victims[i] = candidates_[i].second;
        return found;
    }

private:
    // Prefill and decode are traced and matched apart.
    struct Phase {
        explicit Phase(EamCollection from)
            : collection(std::move(from)),
              request(static_cast<size_t>(collection.shape().total()), 0.0f) {}
        // `match` refers to `collection`.
        Phase(Phase&& other) : Phase(std::move(other.collection)) {}

        void add(const Step& step) {
            for (size_t i = 0; i < step.experts.size(); ++i) {
                request[static_cast<size_t>(step.experts[i])] +=
                    step.counts.empty() ? 1.0f : static_cast<float>(step.counts[i]);
            }
            active = active || !step.experts.empty();
            match.add_row(step.layer, step.experts, step.counts);
        }

        void finish_request() {
            if (active) collection.add(request);
            std::fill(request.begin(), request.end(), 0.0f);
            active = false;
            match.restart();
        }

        EamCollection collection;
        EamMatch match{collection};
        std::vector<float> request;  // the request's rEAM so far
        std::vector<int32_t> nearest;
        bool active = false;
    };

    void score() {
        const Phase& phase = current_ == nullptr ? phases_[1] : *current_;
        matched_ = phase.nearest;
        scored_ = &phase;
        if (matched_.empty()) {
            predicted_ = phase.request;
            normalise_rows(shape_, predicted_);
        } else {
            predict_activations(phase.collection, matched_, predicted_);
        }
        for (int32_t expert = 0; expert < shape_.total(); ++expert) {
            const float layer = static_cast<float>(expert / shape_.num_experts);
            scores_[static_cast<size_t>(expert)] =
                (predicted_[static_cast<size_t>(expert)] + kEpsilon) *
                (1.0f - layer / static_cast<float>(shape_.num_layers));
        }
        stale_ = false;
    }

    PolicyShape shape_;
    Phase phases_[2];
    int32_t layer_ = -1;  // of the latest step
    const Phase* current_ = nullptr;
    const Phase* scored_ = nullptr;  // what predicted_ and scores_ were made from
    std::vector<int32_t> matched_;
    bool stale_ = true;
    std::vector<float> predicted_, scores_;              // by flat expert
    std::vector<std::pair<float, int32_t>> candidates_;  // scratch
};

}  // namespace

std::unique_ptr<Policy> make_eam(PolicyShape shape) {
    constexpr int32_t kPaperCapacity = 120;
    return make_eam(EamCollection(shape, kPaperCapacity), EamCollection(shape, kPaperCapacity));
}

std::unique_ptr<Policy> make_eam(EamCollection prefill, EamCollection decode) {
    return std::make_unique<Eam>(std::move(prefill), std::move(decode));
}

}  // namespace moeinf
