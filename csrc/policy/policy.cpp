#include "policy/policy.h"

#include <algorithm>
#include <charconv>

#include "base/error.h"
#include "policy/policies/row.h"

#define MOEINF_POLICIES(ROW) \
    ROW(lru)                 \
    ROW(lfu)                 \
    ROW(decayed_lfu)         \
    ROW(classlru)            \
    ROW(eam)                 \
    ROW(learned)

namespace moeinf {

namespace policies {
#define MOEINF_DECLARE(row) extern const PolicyRow row;
MOEINF_POLICIES(MOEINF_DECLARE)
#undef MOEINF_DECLARE
}  // namespace policies

namespace {

constexpr const PolicyRow* kRows[] = {
#define MOEINF_ADDRESS(row) &policies::row,
    MOEINF_POLICIES(MOEINF_ADDRESS)
#undef MOEINF_ADDRESS
};

[[noreturn]] void invalid(const std::string& message) {
    throw Error(ErrorCode::kInvalid, message);
}

std::string text(double value) {
    char digits[32];
    return {digits, std::to_chars(digits, digits + sizeof digits, value).ptr};
}

// Takes the part before the next colon off `rest`.
std::string_view take_part(std::string_view& rest) {
    const std::string_view part = rest.substr(0, rest.find(':'));
    rest.remove_prefix(std::min(rest.size(), part.size() + 1));
    return part;
}

const PolicyRow& row_of(std::string_view policy) {
    const std::string_view name = take_part(policy);
    std::string known;
    for (const PolicyRow* row : kRows) {
        if (row->name == name) return *row;
        known += (known.empty() ? "" : ", ") + std::string(row->name);
    }
    invalid("no policy is named '" + std::string(name) + "'; there are: " + known);
}

size_t find_parameter(const PolicyRow& row, std::string_view name) {
    std::string known;
    for (size_t i = 0; i < row.parameters.size(); ++i) {
        const PolicyParameter& one = row.parameters[i];
        if (one.name == name) return i;
        known += (known.empty() ? "" : ", ") + std::string(one.name) + " (" + text(one.least) +
                 " to " + text(one.greatest) + ", usually " + text(one.usual) + ")";
    }
    invalid("policy '" + std::string(row.name) + "' has no parameter '" + std::string(name) +
            "'; there are: " + (known.empty() ? "none" : known));
}

double read_value(const PolicyRow& row, const PolicyParameter& parameter, std::string_view value) {
    double number = 0;
    const char* const end = value.data() + value.size();
    const auto [stop, error] = std::from_chars(value.data(), end, number);
    const bool in_range = number >= parameter.least && number <= parameter.greatest;
    if (error != std::errc() || stop != end || !in_range) {
        invalid("parameter '" + std::string(parameter.name) + "' of policy '" +
                std::string(row.name) + "': expected " + text(parameter.least) + " to " +
                text(parameter.greatest) + ", found '" + std::string(value) + "'");
    }
    return number;
}

std::vector<double> read_values(const PolicyRow& row, std::string_view policy) {
    std::vector<double> values;
    for (const PolicyParameter& parameter : row.parameters) values.push_back(parameter.usual);
    if (policy.ends_with(':')) (void)find_parameter(row, "");  // always refused
    (void)take_part(policy);
    while (!policy.empty()) {
        const std::string_view setting = take_part(policy);
        const size_t equals = std::min(setting.find('='), setting.size());
        const size_t i = find_parameter(row, setting.substr(0, equals));
        values[i] = read_value(row, row.parameters[i],
                               setting.substr(std::min(equals + 1, setting.size())));
    }
    return values;
}

}  // namespace

std::vector<std::string> policy_names() {
    std::vector<std::string> names;
    for (const PolicyRow* row : kRows) names.emplace_back(row->name);
    return names;
}

std::span<const PolicyParameter> policy_parameters(std::string_view policy) {
    return row_of(policy).parameters;
}

bool policy_collects(std::string_view policy) {
    return row_of(policy).collects;
}

std::unique_ptr<Policy> make_policy(std::string_view policy, ModelShape shape,
                                    const Collection* from) {
    if (shape.num_layers < 1 || shape.num_experts < 1) {
        invalid("a policy needs at least one layer and one expert, not " +
                std::to_string(shape.num_layers) + " layers of " +
                std::to_string(shape.num_experts) + " experts");
    }
    const PolicyRow& row = row_of(policy);
    return row.make(shape, read_values(row, policy), from);
}

}  // namespace moeinf
