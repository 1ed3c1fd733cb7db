// The one exception type of the core. Bindings turn each code into its Python exception;
// messages name the file or tensor concerned, what was expected and what was found.
#pragma once

#include <stdexcept>
#include <string>

namespace moeinf {

enum class ErrorCode {
    kInvalid,      // an argument that can never work            -> ValueError
    kRead,         // a file that is missing, short or unreadable -> moeinf.ReadError (an OSError)
    kCapacity,     // more slots or memory than there are         -> moeinf.CapacityError
    kUnsupported,  // something this machine or build lacks       -> moeinf.UnsupportedError
};

class Error : public std::runtime_error {
public:
    Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}

    [[nodiscard]] ErrorCode code() const noexcept { return code_; }

private:
    ErrorCode code_;
};

}  // namespace moeinf
