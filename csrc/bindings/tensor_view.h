// A tensor of torch as the caller's thread sees it, without Python attributes: each of those costs
// microseconds in a decode step, whose weights drive the interpreter out of the processor's caches.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "base/dtype.h"
#include "bindings/dlpack_abi.h"

namespace moeinf {

struct DLPackExchange;

// Valid while the tensor lives and is not changed.
class TensorView {
public:
    explicit TensorView(pybind11::handle tensor);

    // In RAM, [n, m], rows without gaps, of that number of columns unless it is -1.
    [[nodiscard]] bool is_plain_matrix(int64_t columns = -1) const noexcept;
    // In RAM, [n], without gaps.
    [[nodiscard]] bool is_plain_vector() const noexcept;

    // In RAM, [..., m], elements of a row beside each other, rows at one distance.
    struct Rows {
        int64_t count;
        int64_t columns;
        int64_t stride;  // in elements, at least `columns`
    };
    [[nodiscard]] std::optional<Rows> as_rows() const noexcept;

    // A tensor in RAM of the same type, [..., columns], its elements not set. torch's own way takes
    // 10 to 20 us more where its code is not in the processor's caches.
    [[nodiscard]] pybind11::object new_rows(int64_t columns) const;

    // The same of another type. Only where `can_make`.
    [[nodiscard]] pybind11::object new_ids(int64_t columns) const;
    // As `new_rows`, [batch, heads, tokens, head_dim], where the heads of a token lie beside each
    // other. Only where `can_make`.
    [[nodiscard]] pybind11::object new_heads(int64_t batch, int64_t heads, int64_t tokens,
                                             int64_t head_dim) const;
    [[nodiscard]] bool can_make() const noexcept { return exchange_ != nullptr; }

    [[nodiscard]] int64_t rows() const noexcept { return tensor_.shape[0]; }
    [[nodiscard]] int64_t columns() const noexcept { return tensor_.shape[1]; }

    [[nodiscard]] std::optional<DType> floats() const noexcept;     // none: of another type
    [[nodiscard]] std::optional<bool> ints_of_64() const noexcept;  // false: of 32
    [[nodiscard]] bool bytes() const noexcept;
    [[nodiscard]] int dimensions() const noexcept { return tensor_.ndim; }
    [[nodiscard]] int64_t size(int dimension) const noexcept { return tensor_.shape[dimension]; }
    [[nodiscard]] void* data() const noexcept;

private:
    [[nodiscard]] pybind11::object make(int dimensions, const int64_t* shape,
                                        const int64_t* strides, int64_t count,
                                        DLDataType type) const;

    DLTensor tensor_{};  // without dimensions, where the tensor has no memory that can be read
    pybind11::handle object_;
    const DLPackExchange* exchange_;  // null: torch before 2.10
    pybind11::object owner_;
};

}  // namespace moeinf
