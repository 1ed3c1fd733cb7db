// A tensor of torch as the caller's thread sees it, without Python attributes: each of those costs
// microseconds in a decode step, whose weights drive the interpreter out of the processor's caches.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "base/dtype.h"
#include "bindings/dlpack_abi.h"

namespace moeinf {

// Valid while the tensor lives and is not changed.
class TensorView {
public:
    explicit TensorView(pybind11::handle tensor);

    // In RAM, [n, m], rows without gaps, of that number of columns unless it is -1.
    [[nodiscard]] bool is_plain_matrix(int64_t columns = -1) const noexcept;
    [[nodiscard]] int64_t rows() const noexcept { return tensor_.shape[0]; }
    [[nodiscard]] int64_t columns() const noexcept { return tensor_.shape[1]; }

    [[nodiscard]] std::optional<DType> floats() const noexcept;     // none: of another type
    [[nodiscard]] std::optional<bool> ints_of_64() const noexcept;  // false: of 32
    [[nodiscard]] void* data() const noexcept;

private:
    DLTensor tensor_{};  // without dimensions, where the tensor has no memory that can be read
    pybind11::object owner_;
};

}  // namespace moeinf
