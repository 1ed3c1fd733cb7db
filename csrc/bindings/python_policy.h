// A policy written in Python, for research: the simulator asks it as it asks any other.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "policy/policy.h"

namespace moeinf {

// `policy` has observe(step) and score(residents); see moeinf.traces.simulator.
std::unique_ptr<Policy> make_python_policy(pybind11::object policy);

}  // namespace moeinf
