// One maker per predictor. A new one is one file in this folder, one line here, and one row of the
// table in prefetch/predictor.cpp.
#pragma once

#include <memory>

#include "prefetch/predictor.h"

namespace moeinf {

// `from`: what it starts from; null: nothing.
std::unique_ptr<Predictor> make_previous_predictor(ModelShape shape, const Collection* from);
std::unique_ptr<Predictor> make_transition_predictor(ModelShape shape, const Collection* from);
std::unique_ptr<Predictor> make_eam_predictor(ModelShape shape, const Collection* from);

}  // namespace moeinf
