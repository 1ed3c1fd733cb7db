// What a router's ids name: distinct experts in order of first appearance, with their routes, and a
// refusal of ids that mean nothing. Against a map that is built the slow way.
#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/routing.h"
#include "check.h"
#include "scratch.h"

using namespace moeinf;

namespace {

template <class Id>
void test_random_ids(std::mt19937& random) {
    for (const int32_t num_experts : {1, 7, 130}) {
        Routing routing(num_experts);  // the same one throughout: nothing stays from a call before
        for (int32_t round = 0; round < 50; ++round) {
            const auto tokens = int64_t(random() % 20), top_k = int64_t(1 + random() % 9);
            std::vector<Id> ids(size_t(tokens * top_k));
            for (Id& id : ids) id = Id(int64_t(random() % uint32_t(num_experts + 2)) - 1);
            routing.read(ids.data(), tokens, top_k);

            std::vector<Id> expected;
            for (const Id id : ids) {
                const bool named = id != -1 && id != num_experts;
                if (named && std::ranges::count(expected, id) == 0) expected.push_back(id);
            }
            CHECK_EQ(routing.experts().size(), expected.size());
            for (size_t i = 0; i < expected.size(); ++i) {
                CHECK_EQ(int64_t{number(routing.experts()[i])}, int64_t{expected[i]});
                CHECK_EQ(int64_t{routing.counts()[i]},
                         int64_t{std::ranges::count(ids, expected[i])});
                CHECK_EQ(routing.position_of(expected[i]), int32_t(i));
            }
            CHECK_EQ(routing.position_of(-1), -1);
            CHECK_EQ(routing.position_of(num_experts), -1);
            CHECK_EQ(routing.names_past_the_end(), std::ranges::count(ids, Id(num_experts)) > 0);
        }
    }
}

template <class Id>
void test_refusals(std::vector<Id> wrong) {
    Routing routing(7);
    for (const Id bad : wrong) {
        std::vector<Id> ids{3, 3, -1, 7, 0, bad, 1, 2};
        std::string message;
        try {
            routing.read(ids.data(), 4, 2);
        } catch (const Error& error) {
            message = error.what();
        }
        CHECK_EQ(message, "router ids: expected -1 to 7, found " + std::to_string(bad) +
                              " at token 2, position 1");
        CHECK(routing.experts().empty());
        ids[5] = 6;
        routing.read(ids.data(), 4, 2);
        CHECK_EQ(routing.experts().size(), size_t{5});
    }
}

}  // namespace

int main() {
    std::mt19937 random(static_cast<uint32_t>(drawn_seed()));
    test_random_ids<int32_t>(random);
    test_random_ids<int64_t>(random);
    test_refusals<int32_t>({-2, 8, INT32_MAX, INT32_MIN});
    test_refusals<int64_t>({-2, 8, int64_t{1} << 32, -(int64_t{1} << 40), INT64_MAX, INT64_MIN});
    return test_result();
}
