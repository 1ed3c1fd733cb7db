// One maker per policy. A new policy is one file in this folder, one line here, and one row of the
// table in policy/policy.cpp.
#pragma once

#include <memory>

#include "policy/eam.h"
#include "policy/policy.h"

namespace moeinf {

std::unique_ptr<Policy> make_lru(ModelShape shape);
std::unique_ptr<Policy> make_lfu(ModelShape shape);
std::unique_ptr<Policy> make_decayed_lfu(ModelShape shape);
std::unique_ptr<Policy> make_classlru(ModelShape shape);
std::unique_ptr<Policy> make_eam(ModelShape shape);  // starts with empty collections
std::unique_ptr<Policy> make_eam(Eamc from);
std::unique_ptr<Policy> make_learned(ModelShape shape);

}  // namespace moeinf
