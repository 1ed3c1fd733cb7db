// A row of a table by its name.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include "base/error.h"

namespace moeinf {

// Throws Error(kInvalid) for an unknown name, listing those there are; `what` says what is named.
[[nodiscard]] inline size_t find_name(std::span<const std::string> names, std::string_view name,
                                      const std::string& what) {
    std::string message = "no " + what + " is named '";
    message.append(name).append("'; there are:");
    for (size_t i = 0; i < names.size(); ++i) {
        if (names[i] == name) return i;
        message.append(i == 0 ? " " : ", ").append(names[i]);
    }
    throw Error(ErrorCode::kInvalid, message);
}

}  // namespace moeinf
