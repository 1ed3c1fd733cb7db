// The whole test framework. TEST("what is promised") { ... } is a case. CHECK and CHECK_EQ print a
// failure and go on, REQUIRE leaves the case. run_tests() runs the cases whose names contain the
// program's first argument.
#pragma once

#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

struct TestCase {
    std::string name;
    void (*run)();
};
inline std::vector<TestCase> test_cases;
inline int failed_checks = 0;
struct LeaveCase {};

inline std::ostream& report_failure(const char* file, int line) {
    ++failed_checks;
    return std::cerr << file << ":" << line << ": ";
}

#define TEST_AT_(name, line)                                                                \
    static void case_at_##line();                                                           \
    static const bool listed_##line = (test_cases.push_back({name, case_at_##line}), true); \
    static void case_at_##line()
#define TEST_AT(name, line) TEST_AT_(name, line)
#define TEST(name) TEST_AT(name, __LINE__)

#define CHECK(condition) \
    ((condition) ? (void)0 : (void)(::report_failure(__FILE__, __LINE__) << #condition << "\n"))
#define REQUIRE(condition)                                                              \
    ((condition) ? (void)0                                                              \
                 : ((void)(::report_failure(__FILE__, __LINE__) << #condition << "\n"), \
                    throw LeaveCase()))
#define CHECK_EQ(left, right) check_equal(left, right, #left " == " #right, __FILE__, __LINE__)

template <class Left, class Right>
void check_equal(const Left& left, const Right& right, const char* what, const char* file,
                 int line) {
    if (!(left == right))
        ::report_failure(file, line) << what << ": " << left << " and " << right << "\n";
}

inline int test_result() {
    return failed_checks == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

inline int run_tests(int argc, char** argv) {
    int run = 0;
    for (const TestCase& one : test_cases) {
        if (argc > 1 && one.name.find(argv[1]) == std::string::npos) continue;
        const int before = failed_checks;
        ++run;
        try {
            one.run();
        } catch (const LeaveCase&) {
        } catch (const std::exception& error) {
            ::report_failure(one.name.c_str(), 0) << "unexpected error: " << error.what() << "\n";
        }
        if (failed_checks > before) std::cerr << "FAILED: " << one.name << "\n";
    }
    std::cout << run << " cases\n";
    return run > 0 ? test_result() : EXIT_FAILURE;
}
