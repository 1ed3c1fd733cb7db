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

bool finds_a_gain(uint64_t seed, double gain, double noise, int64_t within) {
    Passes passes(seed);
    CHECK(passes.trial.state() == State::kOff);
    passes.run(within, gain, noise);
    passes.run(3000, gain, noise);
    return passes.fetched > 3000 / 2;
}

bool loses_little(uint64_t seed, double loss, double noise) {
    Passes passes(seed);
    passes.run(10000, -loss, noise);
    return static_cast<double>(passes.fetched) * loss < 0.01 * 10000 &&
           passes.trial.state() != State::kOn;
}

bool follows_a_gain_that_ends(uint64_t seed) {
    Passes passes(seed);
    passes.run(600, 0.1, 0.05);
    const bool found = passes.trial.state() == State::kOn;
    passes.run(600, -0.1, 0.05);
    const bool left = passes.trial.state() != State::kOn;
    passes.run(3000, -0.1, 0.05);
    const bool stayed_off = passes.fetched < 300;
    passes.run(6000, 0.1, 0.05);
    return found && left && stayed_off && passes.trial.state() == State::kOn &&
           passes.trial.gain() > 0.05 && passes.trial.switches() >= 3;
}

// The trial is a statistical test, and noise misleads it about once in 2,000 runs of each kind. Two
// misses of one kind in 20 runs mean a fault.
template <class Run>
void check_nearly_always(uint64_t seed, const char* what, const Run& run) {
    int misses = 0;
    for (uint64_t i = 0; i < 20; ++i) misses += !run(seed + i);
    if (misses > 0) std::cout << what << ": " << misses << " of 20 runs missed\n";
    CHECK(misses <= 1);
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
    const uint64_t seed = drawn_seed();
    check_nearly_always(seed, "gain 0.2", [](auto s) { return finds_a_gain(s, 0.2, 0.1, 300); });
    check_nearly_always(seed, "gain 0.05",
                        [](auto s) { return finds_a_gain(s, 0.05, 0.02, 1000); });
    check_nearly_always(seed, "loss 0.15", [](auto s) { return loses_little(s, 0.15, 0.1); });
    check_nearly_always(seed, "loss 0.05", [](auto s) { return loses_little(s, 0.05, 0.3); });
    check_nearly_always(seed, "loss 0.02", [](auto s) { return loses_little(s, 0.02, 0.02); });
    check_nearly_always(seed, "a gain that ends", follows_a_gain_that_ends);
}

}  // namespace

int main(int argc, char** argv) {
    return run_tests(argc, argv);
}
