#include "cpu_kernels/gate.h"

#include <cmath>

#include "base/error.h"
#include "base/find_name.h"
#include "cpu_kernels/gates.h"

namespace moeinf {
namespace {

template <class... Rows>
std::vector<std::string> names(std::tuple<Rows...>* /*table*/) {
    return {std::string(Rows::kName)...};
}

template <class... Rows>
std::vector<Uses> uses(std::tuple<Rows...>* /*table*/) {
    return {Rows::kUses...};
}

[[noreturn]] void invalid(std::string_view function, const std::string& reason) {
    std::string message = "gate function '";
    message.append(function).append("': ").append(reason);
    throw Error(ErrorCode::kInvalid, message);
}

}  // namespace

std::vector<std::string> gate_functions() {
    return names(static_cast<GateFunctions*>(nullptr));
}

std::vector<std::string> activations() {
    return names(static_cast<Activations*>(nullptr));
}

Gate find_gate(std::string_view function, std::string_view activation, float alpha, float limit) {
    const size_t row = find_name(gate_functions(), function, "gate function");
    const size_t act = find_name(activations(), activation, "activation");
    const Uses use = uses(static_cast<GateFunctions*>(nullptr))[row];
    if (!use.activation && act != 0) {
        invalid(function, "has an activation of its own: expected '" + activations()[0] +
                              "', found '" + activations()[act] + "'");
    }
    if (use.alpha && !(alpha > 0 && std::isfinite(alpha))) {
        invalid(function, "expected a finite alpha above 0, found " + std::to_string(alpha));
    }
    if (use.limit && !(limit > 0 && (std::isfinite(limit) || !use.finite_limit))) {
        invalid(function, std::string("expected a ") + (use.finite_limit ? "finite " : "") +
                              "limit above 0, found " + std::to_string(limit));
    }
    const size_t kernel = row * std::tuple_size_v<Activations> + act;
    return {static_cast<int>(kernel), use.up, alpha, limit};
}

}  // namespace moeinf
