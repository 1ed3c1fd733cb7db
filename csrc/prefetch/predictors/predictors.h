// One maker per predictor. A new one is one file in this folder, one line here, and one row of the
// table in prefetch/predictor.cpp.
#pragma once

#include <memory>

#include "policy/eam.h"
#include "prefetch/predictor.h"

namespace moeinf {

std::unique_ptr<Predictor> make_previous_predictor(ModelShape shape);
std::unique_ptr<Predictor> make_transition_predictor(ModelShape shape);
std::unique_ptr<Predictor> make_eam_predictor(ModelShape shape);  // with empty collections
std::unique_ptr<Predictor> make_eam_predictor(Eamc from);

}  // namespace moeinf
