#include "prefetch/prefetch_trial.h"

#include <algorithm>
#include <cmath>

namespace moeinf {

bool PrefetchTrial::begin_pass(bool promising) {
    if (state_ == State::kOff) {
        if (rest_ > 0) --rest_;
        if (rest_ == 0 && promising) turn(State::kTrying);
    } else if (!promising) {
        turn(State::kOff);
    }
    switch (state_) {
        case State::kOff:
            fetching_ = false;
            break;
        case State::kTrying:  // with first in one round, without first in the next
            fetching_ = (place_ / kBlock + rounds_) % 2 == 0;
            break;
        case State::kOn:
            fetching_ = place_ >= kBlock;
            break;
    }
    return fetching_;
}

void PrefetchTrial::end_pass(double seconds) {
    if (state_ == State::kOff) return;
    const double kept = usual_ > 0 ? std::min(seconds, kMaxPass * usual_) : seconds;
    usual_ = usual_ > 0 ? usual_ + kUsualRate * (kept - usual_) : kept;
    Arm& arm = fetching_ ? with_ : without_;
    arm.seconds += kept;
    ++arm.passes;
    if (++place_ == (state_ == State::kOn ? kRoundWhileOn : 2 * kBlock)) end_round();
}

void PrefetchTrial::end_round() {
    const double gain = without_.seconds > 0 ? 1 - with_.mean() / without_.mean() : 0.0;
    count_ = kKeepRounds * count_ + 1;
    sum_ = kKeepRounds * sum_ + gain;
    squares_ = kKeepRounds * squares_ + gain * gain;
    ++rounds_;
    start_round();
    if (state_ == State::kOn) {
        if (this->gain() < 0) turn(State::kOff);
    } else if (rounds_ >= kMinRounds) {
        if (this->gain() > kSureOfGain * error()) {
            turn(State::kOn);
        } else if (this->gain() < -kSureOfLoss * error() || rounds_ == kMaxRounds) {
            turn(State::kOff);
        }
    }
}

void PrefetchTrial::turn(State to) {
    if (to == State::kTrying) count_ = sum_ = squares_ = 0;
    if (to == State::kOn) next_rest_ = kMinRest;
    if (to == State::kOff) {
        rest_ = next_rest_;
        if (state_ == State::kTrying) next_rest_ = std::min(2 * next_rest_, kMaxRest);
    }
    switches_ += (state_ == State::kOn) != (to == State::kOn);
    state_ = to;
    rounds_ = 0;
    start_round();
}

void PrefetchTrial::start_round() {
    place_ = 0;
    with_ = without_ = {};
}

double PrefetchTrial::gain() const noexcept {
    return count_ > 0 ? sum_ / count_ : 0.0;
}

double PrefetchTrial::error() const noexcept {
    if (count_ <= 1) return 0.0;
    const double mean = sum_ / count_;
    return std::sqrt(std::max(0.0, squares_ / count_ - mean * mean) / (count_ - 1));
}

}  // namespace moeinf
