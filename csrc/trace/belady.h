// Belady's optimal replacement, for comparison only. It must know the future, so it is made from
// the trace that it is simulated on. The live cache cannot use it.
#pragma once

#include <memory>

#include "policy/policy.h"
#include "trace/trace.h"

namespace moeinf {

// Evicts the expert with the farthest next use. An expert that is never used again is infinitely
// far; ties go to the lower flat id. Keeps 4 bytes per access of the trace. The policy must see
// exactly the steps of `trace`, once and in order.
std::unique_ptr<Policy> make_belady(const TraceView& trace);

}  // namespace moeinf
