#include "compute/row_sum.h"

#include <cstring>

namespace moeinf {
namespace {

constexpr int kLanes = 8;      // of a register of torch's sums
constexpr int kColumns = 4;    // registers that torch adds to at a time
constexpr int kLevels = 4;     // sums of sums, so that long rows lose no accuracy
constexpr int kBlockBits = 4;  // of rows of no more than 2^20 numbers
constexpr int64_t kBlock = int64_t{1} << kBlockBits;

struct Sums {
    float of[kLevels][kColumns][kLanes] = {};

    void add(int level, const float* from) {
        for (int c = 0; c < kColumns; ++c) {
            for (int l = 0; l < kLanes; ++l) of[level][c][l] += from[c * kLanes + l];
        }
    }
};

float long_sum(const float* values, int64_t count) {
    constexpr int64_t kStep = int64_t{kColumns} * kLanes;
    Sums sums;
    const int64_t steps = count / kStep;
    int64_t i = 0;
    while (i + kBlock <= steps) {
        for (int64_t j = 0; j < kBlock; ++j, ++i) sums.add(0, values + i * kStep);
        for (int level = 1; level < kLevels; ++level) {
            sums.add(level, sums.of[level - 1][0]);
            std::memset(sums.of[level - 1], 0, sizeof sums.of[0]);
            if ((i >> (level * kBlockBits)) % kBlock != 0) break;
        }
    }
    for (; i < steps; ++i) sums.add(0, values + i * kStep);
    for (int level = 1; level < kLevels; ++level) sums.add(0, sums.of[level][0]);
    auto& columns = sums.of[0];
    const int64_t vectors = count / kLanes;
    for (int64_t v = steps * kColumns; v < vectors; ++v) {
        for (int l = 0; l < kLanes; ++l) columns[0][l] += values[v * kLanes + l];
    }
    for (int c = 1; c < kColumns; ++c) {
        for (int l = 0; l < kLanes; ++l) columns[0][l] += columns[c][l];
    }
    float total = 0;
    for (int64_t k = vectors * kLanes; k < count; ++k) total += values[k];
    for (int l = 0; l < kLanes; ++l) total += columns[0][l];
    return total;
}

// Of rows that do not fill a register: four sums, then their sum.
float short_sum(const float* values, int64_t count) {
    float sums[kColumns] = {};
    const int64_t whole = count / kColumns * kColumns;
    for (int64_t i = 0; i < whole; ++i) sums[i % kColumns] += values[i];
    for (int64_t i = whole; i < count; ++i) sums[0] += values[i];
    for (int c = 1; c < kColumns; ++c) sums[0] += sums[c];
    return sums[0];
}

}  // namespace

float row_sum(const float* values, int64_t count) {
    return count < kLanes ? short_sum(values, count) : long_sum(values, count);
}

}  // namespace moeinf
