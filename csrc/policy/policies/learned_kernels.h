// The arithmetic of the default policy over the experts of one layer: plain loops over plain arrays
// of floats, in one copy per instruction set. All copies give the same bits, because each does the
// same additions, multiplications and divisions in the same order, and none is fused.
#pragma once

#include <cstddef>

namespace moeinf::learned {

// Per visit of a layer. A rate of use is shrunk towards a prior, as if the prior had been seen for
// a number of visits. The prior is the mean rate for the slow and the fast rate, and the slow rate
// for the rate of the sequence.
inline constexpr float kPriorVisits = 6.0f;
inline constexpr float kSequencePriorVisits = 4.0f;

// Weights of the fixed part of an estimate. Nearby values give the same hit rates.
inline constexpr float kFastWeight = 0.25f;
inline constexpr float kSlowWeight = 0.4f;
inline constexpr float kSequenceWeight = 0.3f;
inline constexpr float kRecencyWeight = 0.5f;
inline constexpr float kConstant = -0.05f;

// Of one layer; arrays by in-layer expert. A rate is (uses + added) * scale.
struct History {
    const float* fast;        // decayed uses
    const float* slow;        // decayed uses
    const float* sequence;    // uses since the sequence began
    const float* unused_for;  // visits since the latest use
    const float* bias;
    float added;
    float fast_scale, slow_scale, sequence_scale;
};

struct Kernels {
    const char* name;
    // uses = keep * uses + gain * counts
    void (*decay)(float* uses, const float* counts, float keep, float gain, size_t n);
    // sums = the fixed part and the bias
    void (*begin_sums)(const History& history, float* sums, size_t n);
    // unused_for = 0 where counts > 0, else one more
    void (*count_visits)(float* unused_for, const float* counts, size_t n);
    // sums += each of the rows, in order
    void (*add_rows)(float* sums, const float* const* rows, size_t num_rows, size_t n);
    // each row += errors * its rate; rows differ from each other
    void (*learn_rows)(float* const* rows, const float* rates, size_t num_rows, const float* errors,
                       size_t n);
    // to += from * factor
    void (*add)(float* to, const float* from, float factor, size_t n);
    // errors = (1 where counts > 0, else discount * logistic(sums)) - values
    void (*outcomes)(const float* counts, const float* sums, const float* values, float discount,
                     float* errors, size_t n);
    // values = logistic(sums)
    void (*logistic)(const float* sums, float* values, size_t n);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
#endif

// The widest that this CPU runs.
const Kernels& fastest_kernels();

}  // namespace moeinf::learned
