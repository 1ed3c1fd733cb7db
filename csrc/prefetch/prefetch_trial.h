// Decides by the clock whether prefetching makes passes faster. Passes with and without it take
// turns, and their times are compared within one round, so other work on the machine has no effect.
// The times contain all costs of prefetching: predictions, woken threads, a shared link.
//
//   kOff --(counts are promising and the pause is over)--> kTrying
//   kTrying --(gain above 3 standard errors)--> kOn
//   kTrying --(loss above 1 standard error, or 32 rounds)--> kOff, and the next pause doubles
//   kOn --(the mean gain is below 0)--> kOff
//   kTrying, kOn --(counts are not promising any more)--> kOff
//
// While on, two passes in sixteen still run without prefetching.
//
// Knows no experts, links or clocks; one thread at a time.
#pragma once

#include <cstdint>

namespace moeinf {

class PrefetchTrial {
public:
    enum class State : uint8_t { kOff, kTrying, kOn };

    // A pass begins. True: read ahead in it. `promising`: counts say that it may pay.
    bool begin_pass(bool promising);

    // The pass that began last took so long. Passes whose time says nothing are not reported.
    void end_pass(double seconds);

    [[nodiscard]] State state() const noexcept { return state_; }
    [[nodiscard]] int64_t switches() const noexcept { return switches_; }  // on or off

    // The share of a pass's time that is saved, and its standard error; 0 before the first round.
    [[nodiscard]] double gain() const noexcept;
    [[nodiscard]] double error() const noexcept;

private:
    static constexpr int32_t kBlock = 2;          // passes alike in a row
    static constexpr int32_t kRoundWhileOn = 16;  // passes, one block of them without
    static constexpr double kMinRounds = 6;
    static constexpr int32_t kMaxRounds = 32;  // of one trial
    static constexpr double kSureOfGain = 3;   // standard errors
    static constexpr double kSureOfLoss = 1;
    static constexpr int64_t kMinRest = 64;  // passes
    static constexpr int64_t kMaxRest = 4096;
    static constexpr double kKeepRounds = 0.95;
    static constexpr double kMaxPass = 4;  // times the usual: a pause counts as no more
    static constexpr double kUsualRate = 0.1;

    struct Arm {
        double seconds = 0;
        int32_t passes = 0;
        [[nodiscard]] double mean() const noexcept { return seconds / passes; }
    };

    void turn(State to);
    void start_round();
    void end_round();

    State state_ = State::kOff;
    int64_t switches_ = 0;
    int64_t rest_ = 0, next_rest_ = kMinRest;
    bool fetching_ = false;                     // in the pass under way
    int32_t place_ = 0;                         // in the round
    int32_t rounds_ = 0;                        // since the latest turn
    Arm with_, without_;                        // of the round
    double usual_ = 0;                          // seconds of a pass
    double count_ = 0, sum_ = 0, squares_ = 0;  // of the rounds' gains
};

}  // namespace moeinf
