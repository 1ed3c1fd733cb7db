#include "prefetch/prefetcher.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace moeinf {
namespace {

constexpr size_t kMaxPredicted = 32;      // experts of one layer
constexpr float kMinScore = 0.1f;         // below this nothing is ever fetched
constexpr float kGreatestScore = 0.8f;    // what is likelier always is
constexpr double kForget = 0.99;          // per prediction, of what pays
constexpr double kForgetWhileOff = 0.99;  // per pass
constexpr double kEnoughPredictions = 16;
constexpr double kSwitchOnMargin = 1.5;  // so that it does not flutter
constexpr int64_t kRegretPasses = 8;     // a miss that late would have come anyway
constexpr int64_t kHintPeriod = 32;      // passes, while switched off
constexpr double kIdleRate = 0.1;
constexpr double kBandwidthKeep = 0.95;
constexpr int32_t kSlotsPerPrefetch = 4;  // prefetches under way leave most slots to steps

}  // namespace

Prefetcher::Prefetcher(PolicyShape shape, std::unique_ptr<Predictor> predictor, Costs costs)
    : shape_(shape),
      predictor_(std::move(predictor)),
      costs_(costs),
      targets_(static_cast<size_t>(shape.num_layers)),
      used_at_(static_cast<size_t>(shape.total()), -1),
      missed_before_(used_at_.size(), -1),
      reading_(used_at_.size(), 0),
      scores_(static_cast<size_t>(shape.num_experts)) {
    stats_.predictor = predictor_ == nullptr ? "external" : std::string(predictor_->name());
}

void Prefetcher::judge(const Step& step, double now) {
    measure_idle(step, now);
    if (step.new_sequence || step.layer <= layer_) start_pass(step, now);
    decoding_ = !step.prefill;
    layer_ = step.layer;
    ++step_;
    for (const int32_t expert : step.experts) used_at_[static_cast<size_t>(expert)] = step_;

    Target& predicted = target(step.layer);
    if (!step.prefill) predicted.usual_experts = step.experts.size();
    if (step.prefill || step.new_sequence || predicted.guesses.empty()) {
        predicted.guesses.clear();
        return;
    }
    ++stats_.steps;
    stats_.active_steps += predicted.active;
    stats_.used += static_cast<int64_t>(step.experts.size());
    judged_ = kForget * judged_ + 1;
    useful_ *= kForget;
    useless_ *= kForget;
    for (const Guess& guess : predicted.guesses) {
        const auto expert = static_cast<size_t>(guess.expert);
        const bool used = used_at_[expert] == step_;
        if (guess.latest) {
            ++stats_.predicted;
            stats_.correct += used;
            stats_.predicted_absent += guess.absent;
            stats_.predicted_absent_used += guess.absent && used;
        }
        if (guess.candidate) (used ? useful_ : useless_) += 1;
        if (!guess.fetched) continue;
        const bool late = reading_[expert] != 0;
        if (used) {
            stats_.late += late;
            if (late) late_.push_back({guess.expert, now});
            if (!late) saved_.add(1.0);
            // A miss would have driven it out as well.
            if (guess.evicted >= 0) missed_before_[static_cast<size_t>(guess.evicted)] = -1;
        } else {
            const double delay =
                static_cast<double>(costs_.delay_bytes) / static_cast<double>(costs_.expert_bytes);
            wasted_.add(late ? std::min(1.0, delay) : 0.0);
        }
    }
    predicted.guesses.clear();
    predicted.fresh = false;
}

// The pass before is over; its time counts if it was a decode pass with another right behind it.
void Prefetcher::start_pass(const Step& step, double now) {
    if (decoding_ && !step.prefill && !step.new_sequence) trial_.end_pass(now - pass_started_);
    ++pass_;
    pass_started_ = now;
    fetching_ = !step.prefill && trial_.begin_pass(promising());
    if (trial_.state() != PrefetchTrial::State::kOff) return;
    // What was learned when it last fetched may not hold any more.
    saved_.forget(kForgetWhileOff);
    wasted_.forget(kForgetWhileOff);
}

void Prefetcher::measure_idle(const Step& step, double now) {
    if (decoding_ && !step.prefill && !step.new_sequence && layer_ >= 0) {
        const double idle =
            demands_ > 0 || !late_.empty() ? 0.0 : now - std::max(started_, demands_ended_);
        double& usual = target(layer_).idle_seconds;
        usual = usual < 0 ? idle : usual + kIdleRate * (idle - usual);
    }
}

void Prefetcher::missed(int32_t expert) {
    int64_t& before = missed_before_[static_cast<size_t>(expert)];
    if (pass_ < before) wasted_.sum += 1.0;
    before = -1;
}

void Prefetcher::look_ahead(const Step& step, double now) {
    started_ = now;
    if (predictor_ != nullptr) predictor_->observe(step);
    if (step.prefill) {
        budget_ = 0;
        return;
    }
    const double left = std::min(budget_, static_cast<double>(costs_.expert_bytes));
    budget_ = std::max(0.0, target(step.layer).idle_seconds) * bandwidth() + left;
    if (predictor_ == nullptr) return;
    const int32_t reach = std::min(predictor_->reach(), shape_.num_layers);
    for (int32_t distance = 1; distance <= reach; ++distance) {
        predict((step.layer + distance) % shape_.num_layers);
    }
}

// The likeliest experts of a layer, as many as it usually uses.
void Prefetcher::predict(int32_t layer) {
    if (!predictor_->predict(layer, scores_)) return;
    const size_t usual = target(layer).usual_experts;
    const size_t most = std::min(
        {usual == 0 ? target(layer_).usual_experts : usual, kMaxPredicted, scores_.size()});
    if (most == 0) return;
    best_.clear();
    for (size_t e = 0; e < scores_.size(); ++e) {
        const float score = scores_[e];
        if (score <= 0.0f || (best_.size() == most && score <= best_.back().first)) continue;
        if (best_.size() == most) best_.pop_back();
        auto place = best_.end();
        while (place != best_.begin() && (place - 1)->first < score) --place;
        best_.insert(place, {score, static_cast<int32_t>(e)});
    }
    if (best_.empty()) return;
    Target& predicted = start_prediction(layer);
    for (const auto& [score, expert] : best_) {
        add_guess(predicted, layer * shape_.num_experts + expert, score);
    }
}

void Prefetcher::hint(int32_t layer, std::span<const int32_t> experts) {
    Target& predicted = start_prediction(layer);
    for (const int32_t expert : experts) add_guess(predicted, expert, 1.0f);
}

// Forgets an earlier prediction, but not what has been fetched for it.
Prefetcher::Target& Prefetcher::start_prediction(int32_t layer) {
    Target& predicted = target(layer);
    std::erase_if(predicted.guesses, [](const Guess& guess) { return !guess.fetched; });
    for (Guess& guess : predicted.guesses) guess.latest = false;
    predicted.fresh = true;
    predicted.active = fetching_;
    return predicted;
}

void Prefetcher::add_guess(Target& target, int32_t expert, float score) {
    const auto known = std::ranges::find(target.guesses, expert, &Guess::expert);
    if (known == target.guesses.end()) {
        target.guesses.push_back({expert, score, true, false, false, false, -1});
    } else {
        known->score = score;
        known->latest = true;
    }
}

std::span<const int32_t> Prefetcher::choose(const Residency& residency) {
    const float least = least_score();
    chances_.clear();
    kept_.clear();
    wanted_.clear();
    for (Target& predicted : targets_) {
        for (Guess& guess : predicted.guesses) {
            const bool absent = residency.slot_of(guess.expert) < 0;
            if (guess.score >= least && !absent) kept_.push_back(guess.expert);
            if (!predicted.fresh || !guess.latest || guess.fetched) continue;
            guess.absent = absent;
            if (guess.score >= least && absent) chances_.emplace_back(guess.score, &guess);
        }
        predicted.fresh = false;
    }
    std::ranges::stable_sort(chances_, std::greater(), &std::pair<float, Guess*>::first);
    const auto bytes = static_cast<double>(costs_.expert_bytes);
    const double under_way = bytes * prefetches_;
    int32_t room = residency.slots() / kSlotsPerPrefetch - prefetches_;
    for (const auto& chance : chances_) {
        if (budget_ - under_way < bytes || room-- <= 0) break;
        budget_ -= bytes;
        chance.second->candidate = true;
        if (fetching_) wanted_.push_back(chance.second->expert);
    }
    return wanted_;
}

void Prefetcher::fetched(int32_t expert, int32_t evicted) {
    ++stats_.fetched;
    for (Guess& guess : target(expert / shape_.num_experts).guesses) {
        if (guess.expert != expert) continue;
        guess.fetched = true;
        guess.evicted = evicted;
    }
    missed_before_[static_cast<size_t>(expert)] = -1;
    if (evicted >= 0) missed_before_[static_cast<size_t>(evicted)] = pass_ + kRegretPasses;
}

void Prefetcher::read_started(int32_t expert, bool demand, double now) {
    if (demands_ + prefetches_ == 0) {
        busy_since_ = now;
        busy_bytes_ = 0;
    }
    ++(demand ? demands_ : prefetches_);
    if (!demand) reading_[static_cast<size_t>(expert)] = 1;
}

void Prefetcher::read_ended(int32_t expert, bool demand, bool complete, double now) {
    --(demand ? demands_ : prefetches_);
    if (demand && demands_ == 0) demands_ended_ = now;
    if (complete) busy_bytes_ += static_cast<double>(costs_.expert_bytes);
    if (demands_ + prefetches_ == 0) {
        read_bytes_ = kBandwidthKeep * read_bytes_ + busy_bytes_;
        read_seconds_ = kBandwidthKeep * read_seconds_ + (now - busy_since_);
    }
    if (demand) return;
    reading_[static_cast<size_t>(expert)] = 0;
    std::erase_if(late_, [&](const Late& late) {
        if (late.expert != expert) return false;
        const double waited = now - late.since;
        const double read = static_cast<double>(costs_.expert_bytes) / std::max(bandwidth(), 1.0);
        stats_.late_seconds += waited;
        saved_.add(std::max(0.0, 1.0 - waited / read));
        demands_ended_ = now;
        return true;
    });
}

double Prefetcher::bandwidth() const noexcept {
    return read_seconds_ > 0 ? read_bytes_ / read_seconds_ : 0.0;
}

float Prefetcher::least_score() const noexcept {
    const double pays = wasted_.value() / (saved_.value() + wasted_.value());
    return std::clamp(static_cast<float>(pays), kMinScore, kGreatestScore);
}

bool Prefetcher::wants_hints() const noexcept {
    return predictor_ == nullptr && decoding_ &&
           (fetching_ || judged_ < kEnoughPredictions || pass_ % kHintPeriod == 0);
}

bool Prefetcher::is_next(int32_t layer) const noexcept {
    return layer_ >= 0 && decoding_ && layer == (layer_ + 1) % shape_.num_layers;
}

// Compares what predictions gain with what they cost, both in reads.
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

std::vector<std::string> prefetch_names() {
    std::vector<std::string> names{"off"};
    for (std::string& name : predictor_names()) names.push_back(std::move(name));
    names.emplace_back("external");
    return names;
}

std::unique_ptr<Prefetcher> make_prefetcher(std::string_view name, PolicyShape shape,
                                            Prefetcher::Costs costs, const Eamc* eamc) {
    if (name == "off") return nullptr;
    const std::vector<std::string> names = prefetch_names();
    if (std::ranges::find(names, name) == names.end()) {
        std::string known;
        for (const std::string& one : names) known += (known.empty() ? "" : ", ") + one;
        throw Error(ErrorCode::kInvalid,
                    "no prefetch is named '" + std::string(name) + "'; there are: " + known);
    }
    auto predictor = name == "external" ? nullptr : make_predictor(name, shape, eamc);
    return std::make_unique<Prefetcher>(shape, std::move(predictor), costs);
}

}  // namespace moeinf
