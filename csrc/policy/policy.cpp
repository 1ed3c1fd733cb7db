#include "policy/policy.h"

#include "base/error.h"
#include "policy/policies/policies.h"

namespace moeinf {
namespace {

struct Row {
    std::string_view name;
    std::unique_ptr<Policy> (*make)(ModelShape);
};

constexpr Row kPolicies[] = {
    // clang-format off
    {"lru", make_lru},
    {"lfu", make_lfu},
    {"decayed_lfu", make_decayed_lfu},
    {"classlru", make_classlru},
    {"eam", make_eam},
    {"learned", make_learned},
    // clang-format on
};

}  // namespace

std::vector<std::string> policy_names() {
    std::vector<std::string> names;
    for (const Row& row : kPolicies) names.emplace_back(row.name);
    return names;
}

std::unique_ptr<Policy> make_policy(std::string_view name, ModelShape shape, const Eamc* eamc) {
    if (shape.num_layers < 1 || shape.num_experts < 1) {
        throw Error(ErrorCode::kInvalid, "a policy needs at least one layer and one expert, not " +
                                             std::to_string(shape.num_layers) + " layers of " +
                                             std::to_string(shape.num_experts) + " experts");
    }
    if (eamc != nullptr && name == "eam") return make_eam(*eamc);
    std::string known;
    for (const Row& row : kPolicies) {
        if (row.name == name) return row.make(shape);
        known += (known.empty() ? "" : ", ") + std::string(row.name);
    }
    throw Error(ErrorCode::kInvalid,
                "no policy is named '" + std::string(name) + "'; there are: " + known);
}

}  // namespace moeinf
