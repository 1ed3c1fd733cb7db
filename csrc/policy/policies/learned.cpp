// The default policy: learns online how soon each expert will be used again, and evicts the one
// whose use is farthest.
//
// Value. For every expert it keeps an estimate of g^n. n is the number of visits of its layer until
// its next use, and g = exp(-1 / horizon). The horizon in tokens grows with the slots, because a
// large cache should look further ahead. The score of a resident is its value times g^(d / L),
// where d is the number of layers until its layer comes again.
//
// Estimate. The logistic function of a sum of three parts. With fixed weights: how often the expert
// was used recently (two decays) and in this sequence, and how long ago. Learned: a bias per
// expert. Learned too: one weight for each expert that was just active at its own layer and at the
// two layers below. Recency and frequency do not see this context: similar tokens use similar
// experts.
//
// Learning. When a layer is visited, each of its experts has a result for the estimate of the
// previous visit: 1 if it was used, else g times its new estimate (temporal-difference learning,
// Sutton 1988). One step of gradient descent follows, over all experts of the layer, resident or
// not. benchmarks/notes/policies.md has the other attempts.
#include <array>
#include <cmath>
#include <utility>

#include "policy/per_caller.h"
#include "policy/policies/expert_heaps.h"
#include "policy/policies/learned_kernels.h"
#include "policy/policies/row.h"

namespace moeinf {
namespace {

constexpr float kContextSlowdown = 0.002f;  // step / sqrt(1 + slowdown * uses)
constexpr size_t kUsualContext = 24;        // experts; larger ones share the step out
constexpr size_t kMaxSet = 32;              // a larger set says little: it is left out
constexpr int32_t kContexts = 3;            // own layer, one below, two below
constexpr int64_t kContextBytes = 128 << 20;
constexpr float kPriorStep = 0.02f;

// Uses of each expert and visits of its layer, both decayed at every visit.
struct Rates {
    explicit Rates(ModelShape shape) : uses(shape.total()), visits(shape.num_layers) {}

    PerExpert<float> uses;
    PerLayer<float> visits;
};

class Learned final : public OrderedPolicy<ScaledOrder<float>> {
public:
    Learned(ModelShape shape, std::span<const double> values)
        : OrderedPolicy(shape.num_layers, shape.num_experts, ScaledOrder<float>(shape)),
          shape_(shape),
          fast_decay_(static_cast<float>(values[0])),
          slow_decay_(static_cast<float>(values[1])),
          bias_step_(static_cast<float>(values[2])),
          context_step_(static_cast<float>(values[3])),
          horizon_per_frame_(static_cast<float>(values[4])),
          frames_(shape.total()),
          experts_per_step_(std::max(1.0f, static_cast<float>(shape.num_experts) / 16.0f)),
          fast_(shape),
          slow_(shape),
          unused_for_(shape.total(), 1000.0f),
          bias_(shape.total()),
          layers_(shape.num_layers),
          counts_(static_cast<size_t>(shape.num_experts)),
          sums_(counts_.size()),
          errors_(counts_.size()) {
        std::fill(order_.factors.begin(), order_.factors.end(), 1.0f);
        const int64_t bytes_per_context = 4LL * shape.total() * shape.num_experts;
        contexts_ = static_cast<int32_t>(
            std::min<int64_t>(kContexts, kContextBytes / std::max<int64_t>(1, bytes_per_context)));
        const auto rows = static_cast<size_t>(contexts_) * bias_.size();
        context_weights_.resize(rows * counts_.size());
        context_rows_.resize(rows);
    }

    std::string_view name() const noexcept override { return "learned"; }

    void observe(const Step& step) override {
        caller_ =
            &callers_.of(step.caller, [this] { return Caller(shape_); }, [](const Caller&) {});
        if (step.new_sequence) {
            std::fill(caller_->sequence.uses.begin(), caller_->sequence.uses.end(), 0.0f);
            std::fill(caller_->sequence.visits.begin(), caller_->sequence.visits.end(), 0.0f);
        }
        if (step.new_sequence || step.layer <= caller_->layer) start_pass();
        caller_->layer = step.layer;
        visit(step.layer);
        if (!step.prefill) {
            ++caller_->decode_steps;
            caller_->decode_experts += step.experts.size();
        }
        remember_set(step);
        gather_context(step.layer);
        prefetch(context_);
        count_uses(step);
        prefetch(layers_[step.layer].context);
        estimate(step.layer);
        if (layers_[step.layer].visited) learn(step.layer);
        finish(step.layer);
    }

    void resized(int32_t frames) override { frames_ = frames; }

    // The log odds of the priors are one more term. Its weight is learned from their success.
    void set_priors(std::span<const float> priors) override {
        prior_odds_.resize(priors.size());
        used_prior_odds_.resize(priors.size());
        for (size_t i = 0; i < priors.size(); ++i) {
            const float kept = std::min(std::max(priors[i], 0.01f), 0.99f);
            prior_odds_[i] = std::log(kept / (1.0f - kept));
        }
    }

private:
    struct ContextRow {
        float uses = 0.0f;   // learned from so often
        uint32_t visit = 0;  // the latest of which it was context
    };
    struct Layer {
        bool visited = false;
        std::vector<int32_t> context;  // rows of context_weights_ behind the estimates made then
    };
    // What is known of the sequence that one caller reads or writes, and of its pass in progress.
    struct Caller {
        explicit Caller(ModelShape shape) : sequence(shape), latest(shape.num_layers) {}

        struct Visit {
            int64_t pass = -1;
            std::vector<ExpertId> set;  // if it says anything
        };
        Rates sequence;
        LayerId layer = LayerId::kNone;  // of the latest step
        int64_t pass = 0;
        float tokens = 1.0f;                          // of the pass, at least
        size_t decode_steps = 0, decode_experts = 0;  // of the pass
        PerLayer<Visit> latest;
    };

    float* row(int32_t context) {
        return context_weights_.data() + static_cast<size_t>(context) * counts_.size();
    }

    void start_pass() {
        ++caller_->pass;
        caller_->tokens = 1.0f;
        if (caller_->decode_steps > 0 && caller_->decode_experts > 0) {
            experts_per_step_ = static_cast<float>(caller_->decode_experts) /
                                static_cast<float>(caller_->decode_steps);
        }
        caller_->decode_steps = 0;
        caller_->decode_experts = 0;
    }

    // Sets the discounts as seen from this layer.
    void visit(LayerId layer) {
        const auto layers = static_cast<float>(shape_.num_layers);
        const float horizon =
            horizon_per_frame_ * static_cast<float>(frames_) / (layers * experts_per_step_) + 1;
        if (horizon != horizon_) {
            horizon_ = horizon;
            discount_per_token_ = std::exp(-1.0f / horizon);
            const float per_layer = std::exp(-1.0f / (horizon * layers));
            by_distance_.assign(static_cast<size_t>(shape_.num_layers) + 1, 1.0f);
            for (size_t d = 1; d < by_distance_.size(); ++d) {
                by_distance_[d] = by_distance_[d - 1] * per_layer;
            }
        }
        // The layers above come at distances from 1, then the others, this one last.
        PerLayer<float>& factors = order_.factors;
        const auto below = factors.begin() + number(layer) + 1;
        const auto next = std::copy_n(by_distance_.begin() + 1, factors.end() - below, below);
        std::copy_n(by_distance_.begin() + 1 + (next - below), number(layer) + 1, factors.begin());
    }

    // A prefill step of n tokens counts as n visits. A step does not state its number of tokens;
    // the largest count of the pass so far is close to it.
    void count_uses(const Step& step) {
        std::fill(counts_.begin(), counts_.end(), 0.0f);
        const size_t from = shape_.begin_of(step.layer);
        float& tokens = caller_->tokens;
        if (step.prefill) {
            for (const int32_t n : step.counts) tokens = std::max(tokens, static_cast<float>(n));
        }
        for (size_t i = 0; i < step.experts.size(); ++i) {
            const bool many = step.prefill && i < step.counts.size();
            counts_[index(step.experts[i]) - from] =
                many ? static_cast<float>(step.counts[i]) / tokens : 1.0f;
        }
        const auto add = [&](Rates& rates, float keep, float gain) {
            float& visits = rates.visits[step.layer];
            visits = keep * visits + gain;
            kernels_.decay(rates.uses.data() + from, counts_.data(), keep, gain, counts_.size());
        };
        const auto add_decayed = [&](Rates& rates, float decay) {
            const float keep = tokens == 1.0f ? decay : std::pow(decay, tokens);
            add(rates, keep, (1.0f - keep) / (1.0f - decay));
        };
        add_decayed(fast_, fast_decay_);
        add_decayed(slow_, slow_decay_);
        add(caller_->sequence, 1.0f, tokens);
        kernels_.count_visits(unused_for_.data() + from, counts_.data(), counts_.size());
    }

    void remember_set(const Step& step) {
        Caller::Visit& latest = caller_->latest[step.layer];
        latest.pass = caller_->pass;
        latest.set.clear();
        if (step.prefill || step.experts.size() > kMaxSet) return;
        latest.set.assign(step.experts.begin(), step.experts.end());
    }

    // Fills context_ with the rows of the experts just active here and in the layers below.
    void gather_context(LayerId layer) {
        ++visit_;
        context_.clear();
        for (int32_t below = 0; below < std::min(contexts_, number(layer) + 1); ++below) {
            const Caller::Visit& source = caller_->latest[LayerId{number(layer) - below}];
            if (source.pass != caller_->pass) break;
            for (const ExpertId expert : source.set) {
                const int32_t context = below * shape_.total() + number(expert);
                context_.push_back(context);
                context_rows_[static_cast<size_t>(context)].visit = visit_;
            }
        }
    }

    // Prefetches the weights, because those of a large model do not fit into the processor's cache.
    void prefetch(const std::vector<int32_t>& rows) {
        for (const int32_t context : rows) {
            const float* weights = row(context);
            for (size_t e = 0; e < counts_.size(); e += 16) __builtin_prefetch(weights + e);
            __builtin_prefetch(&context_rows_[static_cast<size_t>(context)]);
        }
    }

    // Fills sums_ with the new estimates before the logistic function.
    void estimate(LayerId layer) {
        const size_t from = shape_.begin_of(layer);
        const float mean_rate = experts_per_step_ / static_cast<float>(shape_.num_experts);
        kernels_.begin_sums({.fast = fast_.uses.data() + from,
                             .slow = slow_.uses.data() + from,
                             .sequence = caller_->sequence.uses.data() + from,
                             .unused_for = unused_for_.data() + from,
                             .bias = bias_.data() + from,
                             .added = learned::kPriorVisits * mean_rate,
                             .fast_scale = 1.0f / (fast_.visits[layer] + learned::kPriorVisits),
                             .slow_scale = 1.0f / (slow_.visits[layer] + learned::kPriorVisits),
                             .sequence_scale = 1.0f / (caller_->sequence.visits[layer] +
                                                       learned::kSequencePriorVisits)},
                            sums_.data(), sums_.size());
        if (!prior_odds_.empty()) {
            kernels_.add(sums_.data(), prior_odds_.data() + from, prior_weight_, sums_.size());
        }
        rows_.clear();
        for (const int32_t context : context_) rows_.push_back(row(context));
        kernels_.add_rows(sums_.data(), rows_.data(), rows_.size(), sums_.size());
    }

    // One gradient step on the estimates of the previous visit. The new estimates, in sums_, change
    // too where they share weights with them.
    void learn(LayerId id) {
        const size_t from = shape_.begin_of(id);
        const Layer& layer = layers_[id];
        kernels_.outcomes(counts_.data(), sums_.data(), order_.values.data() + from,
                          discount_per_token_, errors_.data(), errors_.size());
        const float share = static_cast<float>(kUsualContext) /
                            static_cast<float>(std::max(kUsualContext, layer.context.size()));
        float shared_step = bias_step_;
        rows_.clear();
        rates_.clear();
        for (const int32_t context : layer.context) {
            ContextRow& source = context_rows_[static_cast<size_t>(context)];
            source.uses += 1.0f;
            const float rate =
                share * context_step_ / std::sqrt(1.0f + kContextSlowdown * source.uses);
            rows_.push_back(row(context));
            rates_.push_back(rate);
            if (source.visit == visit_) shared_step += rate;
        }
        kernels_.learn_rows(rows_.data(), rates_.data(), rows_.size(), errors_.data(),
                            errors_.size());
        kernels_.add(bias_.data() + from, errors_.data(), bias_step_, errors_.size());
        kernels_.add(sums_.data(), errors_.data(), shared_step, errors_.size());
        if (!prior_odds_.empty()) {
            float gradient = 0.0f;
            for (size_t e = 0; e < errors_.size(); ++e) {
                gradient += errors_[e] * used_prior_odds_[from + e];
            }
            prior_weight_ += kPriorStep * gradient / static_cast<float>(errors_.size());
        }
    }

    void finish(LayerId id) {
        const size_t from = shape_.begin_of(id);
        kernels_.logistic(sums_.data(), order_.values.data() + from, sums_.size());
        if (!prior_odds_.empty()) {
            std::copy_n(prior_odds_.data() + from, sums_.size(), used_prior_odds_.data() + from);
        }
        Layer& layer = layers_[id];
        layer.visited = true;
        layer.context.swap(context_);
        residents_.reordered(number(id));
    }

    const learned::Kernels& kernels_ = learned::fastest_kernels();
    ModelShape shape_;
    float fast_decay_, slow_decay_;   // of the rates of use, per visit
    float bias_step_, context_step_;  // of gradient descent
    float horizon_per_frame_;         // in uses of a layer
    int32_t frames_;

    PerCaller<Caller> callers_;
    Caller* caller_ = nullptr;  // of the latest step
    uint32_t visit_ = 0;        // steps seen; may wrap
    float experts_per_step_;

    float horizon_ = 0.0f;  // tokens
    float discount_per_token_ = 0.0f;
    std::vector<float> by_distance_;

    Rates fast_, slow_;
    PerExpert<float> unused_for_;  // visits since the latest use
    PerExpert<float> bias_;
    int32_t contexts_ = 0;
    std::vector<float> context_weights_;  // [contexts, experts, num_experts of the target's layer]
    std::vector<ContextRow> context_rows_;  // [contexts, experts]
    PerLayer<Layer> layers_;
    float prior_weight_ = 0.3f;
    std::vector<float> prior_odds_, used_prior_odds_;  // by flat expert; empty without priors

    std::vector<float> counts_, sums_, errors_;  // of the step, by in-layer expert
    std::vector<int32_t> context_;               // of the step
    std::vector<float*> rows_;                   // scratch
    std::vector<float> rates_;                   // scratch, of these rows
};

}  // namespace

constexpr PolicyParameter kParameters[] = {
    {"fast_decay", 0.8, 0, 0.9999}, {"slow_decay", 0.98, 0, 0.9999}, {"bias_step", 0.02, 0, 1},
    {"context_step", 0.05, 0, 1},   {"horizon", 0.5, 0, 100},
};

namespace policies {
extern const PolicyRow learned = policy_with<Learned>("learned", kParameters);
}  // namespace policies

}  // namespace moeinf
