// The arguments of linear layers out of tensors of the Python caller. None of them: tensors that
// are not rows of numbers of one type in RAM.
#pragma once

#include <optional>

#include "bindings/tensor_view.h"
#include "compute/linear.h"

namespace moeinf {

// Of one token or more.
[[nodiscard]] std::optional<LinearCall> linear_call(const TensorView& x);

// `bias` may be None. Their `out` is not set. The tokens must have as many columns as the weight.
[[nodiscard]] std::optional<LinearPart> plain_part(const LinearCall& call, const TensorView& weight,
                                                   pybind11::handle bias);
[[nodiscard]] std::optional<LinearPart> packed_part(const LinearCall& call,
                                                    const LinearWeight& weight,
                                                    const TensorView& packed,
                                                    pybind11::handle bias);

}  // namespace moeinf
