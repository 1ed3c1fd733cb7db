#include "prefetch/prefetcher.h"

#include <algorithm>
#include <utility>

namespace moeinf {
namespace {

constexpr size_t kMaxPredicted = 32;      // experts of one layer
constexpr float kMinScore = 0.1f;         // experts below it are never fetched
constexpr float kGreatestScore = 0.8f;    // experts above it are always fetched
constexpr double kForget = 0.99;          // per prediction, of what pays
constexpr double kForgetWhileOff = 0.99;  // per pass
constexpr double kEnoughPredictions = 16;
constexpr double kSwitchOnMargin = 1.5;   // so the state changes rarely
constexpr int64_t kRegretPasses = 8;      // a later miss would have happened anyway
constexpr int64_t kHintPeriod = 32;       // passes, while switched off
constexpr int32_t kSlotsPerPrefetch = 4;  // prefetches under way leave most slots to steps

}  // namespace

Prefetcher::Prefetcher(ModelShape shape, std::unique_ptr<Predictor> predictor, Costs costs)
    : shape_(shape),
      predictor_(std::move(predictor)),
      costs_(costs),
      layers_(shape.num_layers),
      used_at_(shape.total(), -1),
      missed_before_(used_at_.size(), -1),
      link_(shape, costs.expert_bytes),
      scores_(static_cast<size_t>(shape.num_experts)) {
    stats_.predictor = predictor_ == nullptr ? "external" : std::string(predictor_->name());
}

void Prefetcher::on_step(const Step& step, double now) {
    if (decoding_ && !step.prefill && !step.new_sequence && is_some(layer_)) {
        link_.next_step(layer_, now);
    }
    Pass& pass = passes_.of(step.caller);
    if (step.new_sequence || step.layer <= pass.layer) start_pass(step, pass, now);
    pass.layer = step.layer;
    pass.decoding = !step.prefill;
    decoding_ = !step.prefill;
    layer_ = step.layer;

    LayerPredictions& predicted = layers_[step.layer];
    if (!step.prefill) {
        predicted.usual_experts = step.experts.size();
        if (!step.new_sequence && !predicted.experts.empty()) judge(step, predicted, now);
    }
    predicted.experts.clear();
}

// Compares what was predicted with what the step uses.
void Prefetcher::judge(const Step& step, const LayerPredictions& predicted, double now) {
    ++step_;
    for (const ExpertId expert : step.experts) used_at_[expert] = step_;
    ++stats_.steps;
    stats_.active_steps += predicted.active;
    stats_.used += static_cast<int64_t>(step.experts.size());
    judged_ = kForget * judged_ + 1;
    useful_ *= kForget;
    useless_ *= kForget;
    for (const Prediction& one : predicted.experts) {
        const bool used = used_at_[one.expert] == step_;
        if (one.latest) {
            ++stats_.predicted;
            stats_.correct += used;
            stats_.predicted_absent += one.absent;
            stats_.predicted_absent_used += one.absent && used;
        }
        if (one.candidate) (used ? useful_ : useless_) += 1;
        if (!one.issued) continue;
        const bool late = link_.prefetching(one.expert);
        if (!used) {
            const double delay =
                static_cast<double>(costs_.delay_bytes) / static_cast<double>(costs_.expert_bytes);
            wasted_.add(late ? std::min(1.0, delay) : 0.0);
            continue;
        }
        stats_.late += late;
        if (late) link_.wait_for(one.expert, now);
        if (!late) saved_.add(1.0);
        // A demand miss would have evicted the same expert.
        if (is_some(one.evicted)) missed_before_[one.evicted] = -1;
    }
}

// The previous pass is over. Its time counts if it was a decode pass directly followed by this one.
void Prefetcher::start_pass(const Step& step, Pass& pass, double now) {
    if (pass.decoding && !step.prefill && !step.new_sequence) trial_.end_pass(now - pass.started);
    ++pass_;
    pass.started = now;
    fetching_ = !step.prefill && trial_.begin_pass(promising());
    if (trial_.state() != PrefetchTrial::State::kOff) return;
    // The costs measured in the last active phase may have changed.
    saved_.forget(kForgetWhileOff);
    wasted_.forget(kForgetWhileOff);
}

void Prefetcher::on_demand_miss(ExpertId expert) {
    int64_t& before = missed_before_[expert];
    if (pass_ < before) wasted_.sum += 1.0;
    before = -1;
}

void Prefetcher::look_ahead(const Step& step, double now) {
    link_.demands_started(now);
    if (predictor_ != nullptr) predictor_->observe(step);
    if (step.prefill) {
        budget_ = 0;
        return;
    }
    const double left = std::min(budget_, static_cast<double>(costs_.expert_bytes));
    budget_ = link_.idle_bytes(step.layer) + left;
    if (predictor_ == nullptr) return;
    const int32_t reach = std::min(predictor_->reach(), shape_.num_layers);
    for (int32_t distance = 1; distance <= reach; ++distance) {
        predict(shape_.after(step.layer, distance));
    }
}

// The most likely experts of a layer, as many as it usually uses.
void Prefetcher::predict(LayerId layer) {
    if (!predictor_->predict(layer, scores_)) return;
    const size_t usual = layers_[layer].usual_experts;
    const size_t most = std::min(
        {usual == 0 ? layers_[layer_].usual_experts : usual, kMaxPredicted, scores_.size()});
    if (most == 0) return;
    best_.clear();
    for (size_t e = 0; e < scores_.size(); ++e) {
        const float score = scores_[e];
        if (score <= 0.0f || (best_.size() == most && score <= best_.back().first)) continue;
        if (best_.size() == most) best_.pop_back();
        auto place = best_.end();
        while (place != best_.begin() && (place - 1)->first < score) --place;
        best_.insert(place, {score, shape_.id(layer, ExpertIndex(e))});
    }
    if (best_.empty()) return;
    layers_[layer].start(fetching_);
    for (const auto& [score, expert] : best_) layers_[layer].add(expert, score);
}

void Prefetcher::on_external(LayerId layer, std::span<const ExpertId> experts) {
    layers_[layer].start(fetching_);
    for (const ExpertId expert : experts) layers_[layer].add(expert, 1.0f);
}

std::span<const ExpertId> Prefetcher::choose(const Residency& residency) {
    const float least = least_score();
    chances_.clear();
    kept_.clear();
    wanted_.clear();
    for (LayerPredictions& predicted : layers_) {
        for (Prediction& one : predicted.experts) {
            const bool absent = !residency.resident(one.expert);
            if (one.score >= least && !absent) kept_.push_back(one.expert);
            if (!predicted.fresh || !one.latest || one.issued) continue;
            one.absent = absent;
            if (one.score >= least && absent) chances_.emplace_back(one.score, &one);
        }
        predicted.fresh = false;
    }
    std::ranges::stable_sort(chances_, std::greater(), &std::pair<float, Prediction*>::first);
    const auto bytes = static_cast<double>(costs_.expert_bytes);
    const double under_way = bytes * link_.prefetches();
    int32_t room = residency.frames() / kSlotsPerPrefetch - link_.prefetches();
    for (const auto& chance : chances_) {
        if (budget_ - under_way < bytes || room-- <= 0) break;
        budget_ -= bytes;
        chance.second->candidate = true;
        if (fetching_) wanted_.push_back(chance.second->expert);
    }
    return wanted_;
}

void Prefetcher::on_issued(ExpertId expert, ExpertId evicted) {
    ++stats_.fetched;
    for (Prediction& one : layers_[shape_.layer_of(expert)].experts) {
        if (one.expert != expert) continue;
        one.issued = true;
        one.evicted = evicted;
    }
    missed_before_[expert] = -1;
    if (is_some(evicted)) missed_before_[evicted] = pass_ + kRegretPasses;
}

void Prefetcher::read_started(ExpertId expert, bool demand, double now) {
    link_.read_started(expert, demand, now);
}

void Prefetcher::read_ended(ExpertId expert, bool demand, bool complete, double now) {
    const double waited = link_.read_ended(expert, demand, complete, now);
    if (waited < 0) return;
    const double read =
        static_cast<double>(costs_.expert_bytes) / std::max(link_.bytes_per_second(), 1.0);
    stats_.late_seconds += waited;
    saved_.add(std::max(0.0, 1.0 - waited / read));
}

float Prefetcher::least_score() const noexcept {
    const double pays = wasted_.value() / (saved_.value() + wasted_.value());
    return std::clamp(static_cast<float>(pays), kMinScore, kGreatestScore);
}

bool Prefetcher::wants_external() const noexcept {
    return predictor_ == nullptr && decoding_ &&
           (fetching_ || judged_ < kEnoughPredictions || pass_ % kHintPeriod == 0);
}

bool Prefetcher::is_next(LayerId layer) const noexcept {
    return is_some(layer_) && decoding_ && layer == shape_.after(layer_, 1);
}

// Compares the gain of predictions with their cost, both in reads.
bool Prefetcher::promising() const noexcept {
    if (judged_ < kEnoughPredictions) return false;
    const bool off = trial_.state() == PrefetchTrial::State::kOff;
    return useful_ * saved_.value() > useless_ * wasted_.value() * (off ? kSwitchOnMargin : 1.0);
}

PredictionStats Prefetcher::stats() const {
    PredictionStats stats = stats_;
    stats.state = trial_.state();
    stats.gain = trial_.gain();
    stats.gain_error = trial_.error();
    stats.switches = trial_.switches() - switches_before_;
    return stats;
}

void Prefetcher::reset_stats() {
    stats_ = {.predictor = std::move(stats_.predictor)};
    switches_before_ = trial_.switches();
}

std::unique_ptr<Prefetcher> make_prefetcher(std::string_view name, ModelShape shape,
                                            Prefetcher::Costs costs, const Collection* from) {
    if (name == "off") return nullptr;
    auto predictor = name == "external" ? nullptr : make_predictor(name, shape, from);
    return std::make_unique<Prefetcher>(shape, std::move(predictor), costs);
}

}  // namespace moeinf
