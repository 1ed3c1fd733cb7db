// Belady's optimal replacement, for comparison only: it must know the future, so it is made from
// the very trace it will be asked about, and the live cache cannot use it.
#pragma once

#include <memory>

#include "policy/policy.h"
#include "trace/trace.h"

namespace moeinf {

// The farthest next use leaves first; never used again counts as infinitely far; ties go to the
// lower flat id. Keeps 4 bytes per access of the trace. The policy expects to see exactly the steps
// of `trace`, once, in order.
std::unique_ptr<Policy> make_belady(const TraceView& trace);

}  // namespace moeinf
