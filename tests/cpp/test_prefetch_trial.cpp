// The trial finds a gain, also a small one under noise. Without a gain it costs almost nothing in
// the long run. It follows a gain that becomes a loss.
#include <cmath>

#include "check.h"
#include "prefetch/prefetch_trial.h"
#include "scratch.h"

using namespace moeinf;

namespace {

using State = PrefetchTrial::State;

// Passes of one second, less `gain` where it reads ahead; noise, a slow drift and rare pauses on
// both alike.
class Passes {
public:
    explicit Passes(uint64_t seed) : random_(seed) {}

    void run(int64_t passes, double gain, double noise, bool promising = true) {
        fetched = 0;
        for (int64_t i = 0; i < passes; ++i) {
            const bool fetch = trial.begin_pass(promising);
            fetched += fetch;
            drift_ = 0.99 * drift_ + 0.02 * noise * normal_(random_);
            double seconds =
                (fetch ? 1 - gain : 1) * (1 + drift_ + noise * std::abs(normal_(random_)));
            if (random_() % 500 == 0) seconds += 60;
            trial.end_pass(seconds);
        }
    }

    PrefetchTrial trial;
    int64_t fetched = 0;

private:
    std::mt19937_64 random_;
    std::normal_distribution<double> normal_;
    double drift_ = 0;
};

void check_a_gain_is_found(uint64_t seed, double gain, double noise, int64_t within) {
    Passes passes(seed);
    CHECK(passes.trial.state() == State::kOff);
    passes.run(within, gain, noise);
    passes.run(3000, gain, noise);
    CHECK(passes.fetched > 3000 / 2);
}

void check_a_loss_costs_little(uint64_t seed, double loss, double noise) {
    Passes passes(seed);
    passes.run(10000, -loss, noise);
    std::cout << "loss " << loss << ", noise " << noise << ": " << passes.fetched << " of 10000\n";
    CHECK(static_cast<double>(passes.fetched) * loss < 0.01 * 10000);
    CHECK(passes.trial.state() != State::kOn);
}

void check_a_gain_that_ends(uint64_t seed) {
    Passes passes(seed);
    passes.run(600, 0.1, 0.05);
    CHECK(passes.trial.state() == State::kOn);
    passes.run(600, -0.1, 0.05);
    CHECK(passes.trial.state() != State::kOn);
    passes.run(3000, -0.1, 0.05);
    CHECK(passes.fetched < 300);
    passes.run(6000, 0.1, 0.05);
    CHECK(passes.trial.state() == State::kOn);
    CHECK(passes.trial.gain() > 0.05);
    CHECK(passes.trial.switches() >= 3);
}

TEST("counts have a veto") {
    const uint64_t seed = drawn_seed();
    Passes passes(seed);
    passes.run(1000, 0.5, 0.05, false);
    CHECK_EQ(passes.fetched, int64_t{0});
    passes.run(300, 0.5, 0.05);
    CHECK(passes.trial.state() == State::kOn);
    passes.run(1, 0.5, 0.05, false);
    CHECK(passes.trial.state() == State::kOff);
    CHECK_EQ(passes.fetched, int64_t{0});
}

TEST("times of nothing") {
    PrefetchTrial trial;
    for (int i = 0; i < 1000; ++i) {
        (void)trial.begin_pass(true);
        trial.end_pass(0);
    }
    CHECK(trial.state() != State::kOn);
    CHECK_EQ(trial.gain(), 0.0);
}

TEST("a gain is found, a loss costs little, and a gain may end") {
    for (uint64_t seed = drawn_seed(), i = 0; i < 20; ++i, ++seed) {
        check_a_gain_is_found(seed, 0.2, 0.1, 300);
        check_a_gain_is_found(seed, 0.05, 0.02, 1000);
        check_a_loss_costs_little(seed, 0.15, 0.1);
        check_a_loss_costs_little(seed, 0.05, 0.3);
        check_a_loss_costs_little(seed, 0.02, 0.02);
        check_a_gain_that_ends(seed);
    }
}

}  // namespace

int main(int argc, char** argv) {
    return run_tests(argc, argv);
}
