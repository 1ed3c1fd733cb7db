// The whole test framework: a failed CHECK prints where and what, and main returns 1.
#pragma once

#include <cstdlib>
#include <iostream>

inline int failed_checks = 0;

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            ++failed_checks;                                                        \
            std::cerr << __FILE__ << ":" << __LINE__ << ": " << #condition << "\n"; \
        }                                                                           \
    } while (false)

#define CHECK_EQ(left, right)                                                                     \
    do {                                                                                          \
        const auto left_value = (left);                                                           \
        const auto right_value = (right);                                                         \
        if (!(left_value == right_value)) {                                                       \
            ++failed_checks;                                                                      \
            std::cerr << __FILE__ << ":" << __LINE__ << ": " << #left << " == " << #right << ": " \
                      << left_value << " and " << right_value << "\n";                            \
        }                                                                                         \
    } while (false)

inline int test_result() {
    return failed_checks == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
