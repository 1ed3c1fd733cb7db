// A torch.nn.Module as the caller's thread sees it, out of its dictionary: its Python attributes
// cost microseconds each in a decode step.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>

#include "bindings/linear_parts.h"
#include "compute/rms_norm.h"

namespace moeinf {

// Borrows everything. A null handle: it is not there.
class ModuleView {
public:
    explicit ModuleView(pybind11::handle module);

    [[nodiscard]] ModuleView child(const char* name) const;

    // Is it of exactly that class, and would a call of it run the forward of the class alone:
    // without hooks, and without a forward of its own? False where there is no module.
    [[nodiscard]] bool runs(pybind11::handle type) const;

    [[nodiscard]] pybind11::handle attribute(const char* name) const;
    [[nodiscard]] pybind11::handle attribute(pybind11::handle name) const;
    // Of torch's own two types of tensors: others may have operators of their own.
    [[nodiscard]] pybind11::handle parameter(const char* name) const;
    [[nodiscard]] pybind11::handle buffer(const char* name) const;

private:
    [[nodiscard]] pybind11::handle member(const char* group, const char* name) const;

    pybind11::handle module_;
    pybind11::object members_;
};

// The layer with the class of moeinf's linear layers or of its packed ones.
[[nodiscard]] std::optional<LinearPart> part_of(const ModuleView& layer, bool packed,
                                                const LinearCall& call);

// A norm that `serve_norms` serves.
struct NormView {
    RmsNorm norm;
    TensorView weight;
};
[[nodiscard]] std::optional<NormView> norm_of(const ModuleView& norm);

}  // namespace moeinf
