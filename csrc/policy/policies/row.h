// The facts that a policy's file states about it. A new policy is one file in this folder with one
// row, and the row's name in the list in policy/policy.cpp.
#pragma once

#include <memory>
#include <span>
#include <string_view>

#include "policy/policy.h"

namespace moeinf {

struct PolicyRow {
    std::string_view name;
    std::span<const PolicyParameter> parameters;
    bool collects;  // can start from a Collection
    // `values` are those of the parameters, in their order.
    std::unique_ptr<Policy> (*make)(ModelShape shape, std::span<const double> values,
                                    const Collection* from);
};

// The row of a policy without parameters that starts from nothing.
template <class P>
constexpr PolicyRow plain_policy(std::string_view name) {
    return {name, {}, false, [](ModelShape shape, std::span<const double>, const Collection*) {
                return std::unique_ptr<Policy>(std::make_unique<P>(shape));
            }};
}

// The row of a policy whose constructor takes the shape and the values.
template <class P>
constexpr PolicyRow policy_with(std::string_view name,
                                std::span<const PolicyParameter> parameters) {
    return {name, parameters, false,
            [](ModelShape shape, std::span<const double> values, const Collection*) {
                return std::unique_ptr<Policy>(std::make_unique<P>(shape, values));
            }};
}

}  // namespace moeinf
