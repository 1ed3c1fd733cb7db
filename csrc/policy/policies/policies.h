// One maker per policy. A new policy is one file in this folder, one line here, and one row of the
// table in policy/policy.cpp.
#pragma once

#include <memory>

#include "policy/eam.h"
#include "policy/policy.h"

namespace moeinf {

std::unique_ptr<Policy> make_lru(PolicyShape shape);
std::unique_ptr<Policy> make_lfu(PolicyShape shape);
std::unique_ptr<Policy> make_lrfu(PolicyShape shape);
std::unique_ptr<Policy> make_classlru(PolicyShape shape);
std::unique_ptr<Policy> make_eam(PolicyShape shape);  // starts with empty collections
std::unique_ptr<Policy> make_eam(Eamc from);
std::unique_ptr<Policy> make_learned(PolicyShape shape);

}  // namespace moeinf
