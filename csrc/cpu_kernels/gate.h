// A gate function with its constants: how the outputs of gate and up become one value. Data only;
// the table of functions is gates.h.
#pragma once

#include <limits>
#include <string>
#include <string_view>
#include <vector>

namespace moeinf {

struct Gate {
    int kernel = 0;  // index into KernelSet::gates
    bool has_up = true;
    float alpha = 1.0f;
    float limit = std::numeric_limits<float>::infinity();
};

// Throws Error(kInvalid) for an unknown name, listing those there are, for an activation that the
// function does not use, and for constants it cannot use.
[[nodiscard]] Gate find_gate(std::string_view function, std::string_view activation, float alpha,
                             float limit);

[[nodiscard]] std::vector<std::string> gate_functions();
[[nodiscard]] std::vector<std::string> activations();

}  // namespace moeinf
