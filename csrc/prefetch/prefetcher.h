// Which experts to read before a step needs them, and whether that pays. The cache reports every
// step, read and eviction, under its lock. The prefetcher turns predictions, from a predictor or
// from outside, into a few experts to read now. It moves no bytes and knows no slots, threads or
// clocks. Times come in as seconds. Three parts: Predictions, LinkMeter, PrefetchTrial.
//
// Budget. After a step the prefetches may use the time in which the link usually rests before the
// next step, less what is still under way. A demand overtakes a prefetch in any case.
//
// Does it pay? r is the useful share of the prefetches. s is the share of a read that a useful one
// saves: less than 1 if it is late. w is what a useless one costs, in reads: the link where it was
// not idle, and evicted experts that are missed soon after. Prefetching may pay where r * s is
// above (1 - r) * w. All three are measured; r also while nothing is fetched, from predictions
// alone. Where these numbers are promising, PrefetchTrial decides by the clock.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "policy/per_caller.h"
#include "policy/residency.h"
#include "prefetch/link_meter.h"
#include "prefetch/predictions.h"
#include "prefetch/predictor.h"
#include "prefetch/prefetch_trial.h"

namespace moeinf {

// Counted when the predicted step comes. Prefill steps are not predicted.
struct PredictionStats {
    std::string predictor = "off";
    PrefetchTrial::State state{};  // off, on trial or on, as of now
    double gain = 0;               // share of a pass's time that fetching saves, as last measured
    double gain_error = 0;         // its standard error; both 0 before it was measured
    int64_t switches = 0;          // times it was switched on or off
    int64_t steps = 0;             // that had been predicted
    int64_t active_steps = 0;      // of these, predicted in passes that fetched
    int64_t used = 0;              // experts of these steps
    int64_t predicted = 0;         // experts that had been predicted for them
    int64_t correct = 0;           // of these, used by the step
    int64_t predicted_absent = 0;  // predicted while not resident
    int64_t predicted_absent_used = 0;
    int64_t fetched = 0;      // prefetches started
    int64_t late = 0;         // whose bytes were not all there when the step came
    double late_seconds = 0;  // until they were
};

class Prefetcher {
public:
    struct Costs {
        int64_t expert_bytes;
        int64_t delay_bytes;  // that a demand may have to wait for, having overtaken a prefetch
    };

    // Without a predictor the only predictions are those of on_external().
    Prefetcher(ModelShape shape, std::unique_ptr<Predictor> predictor, Costs costs);

    // The events of a step, in this order: on_step() before its experts are placed,
    // on_demand_miss() for each expert that gets a slot or passes through, look_ahead() after its
    // demand reads have started.
    void on_step(const Step& step, double now);
    void on_demand_miss(ExpertId expert);
    void look_ahead(const Step& step, double now);

    // A prediction from outside, best first.
    void on_external(LayerId layer, std::span<const ExpertId> experts);
    // True if a prediction from outside may pay in this pass. Sometimes also true while off.
    [[nodiscard]] bool wants_external() const noexcept;
    // True if the step of the previous layer has begun, so an external prediction for this layer
    // can be used.
    [[nodiscard]] bool is_next(LayerId layer) const noexcept;

    // Absent experts to prefetch now, best first. on_issued() must follow for each that is started.
    std::span<const ExpertId> choose(const Residency& residency);
    // Residents that a prefetch must not evict, because they are predicted too.
    [[nodiscard]] std::span<const ExpertId> expected_residents() const noexcept { return kept_; }
    void on_issued(ExpertId expert, ExpertId evicted);

    void read_started(ExpertId expert, bool demand, double now);
    void read_ended(ExpertId expert, bool demand, bool complete, double now);

    [[nodiscard]] PredictionStats stats() const;
    void reset_stats();

    // Null: predictions come only from on_external().
    [[nodiscard]] const Predictor* predictor() const noexcept { return predictor_.get(); }

private:
    struct Pass {                        // that a caller is in
        LayerId layer = LayerId::kNone;  // of its latest step
        double started = 0;
        bool decoding = false;
    };
    // A mean that forgets, and starts from a prior worth `weight` values.
    struct Mean {
        double prior, weight, keep;
        double sum = 0, count = 0;
        void add(double value) noexcept {
            sum = keep * sum + value;
            count = keep * count + 1;
        }
        void forget(double share) noexcept {
            sum *= share;
            count *= share;
        }
        [[nodiscard]] double value() const noexcept {
            return (sum + prior * weight) / (count + weight);
        }
    };

    void start_pass(const Step& step, Pass& pass, double now);
    void judge(const Step& step, const LayerPredictions& predicted, double now);
    void predict(LayerId layer);
    [[nodiscard]] float least_score() const noexcept;
    [[nodiscard]] bool promising() const noexcept;

    ModelShape shape_;
    std::unique_ptr<Predictor> predictor_;
    Costs costs_;
    PerLayer<LayerPredictions> layers_;
    PredictionStats stats_;

    LayerId layer_ = LayerId::kNone;  // of the latest step
    bool decoding_ = false;
    int64_t pass_ = 0;
    int64_t step_ = 0;
    PerExpert<int64_t> used_at_;        // the latest step that used it
    PerExpert<int64_t> missed_before_;  // a miss before this pass is a useless prefetch's fault

    LinkMeter link_;
    double budget_ = 0;  // bytes

    // What pays.
    PrefetchTrial trial_;
    int64_t switches_before_ = 0;  // of the trial, at the latest reset
    bool fetching_ = false;        // in this pass
    PerCaller<Pass> passes_;
    double judged_ = 0, useful_ = 0, useless_ = 0;  // predictions, and candidates among them
    Mean saved_{1.0, 4, 0.97};
    Mean wasted_{0.25, 8, 0.97};

    std::vector<float> scores_;                           // scratch
    std::vector<std::pair<float, ExpertId>> best_;        // scratch
    std::vector<std::pair<float, Prediction*>> chances_;  // scratch
    std::vector<ExpertId> wanted_, kept_;
};

// Null for "off". Throws what make_predictor() throws.
std::unique_ptr<Prefetcher> make_prefetcher(std::string_view name, ModelShape shape,
                                            Prefetcher::Costs costs,
                                            const Collection* from = nullptr);

}  // namespace moeinf
