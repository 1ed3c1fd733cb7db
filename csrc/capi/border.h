// The border to C: statuses for exceptions, the last error, and structs of callers that may be of
// another version.
#pragma once

#include <moeinf.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>

#include "base/error.h"

namespace moeinf::capi {

[[noreturn]] inline void invalid(const std::string& message) {
    throw Error(ErrorCode::kInvalid, message);
}

// Keeps the message of the exception in flight for moeinf_last_error().
[[nodiscard]] moeinf_status status_of_exception() noexcept;

// Every function of the interface is one call of this: no exception leaves it.
template <class Body>
[[nodiscard]] moeinf_status guarded(const Body& body) noexcept {
    try {
        body();
        return MOEINF_OK;
    } catch (...) {
        return status_of_exception();
    }
}

// Throws Error(kUnsupported) for a version that this library does not know.
void check_version(uint32_t version);

template <class T>
void check_head(const T* given, const char* name) {
    if (given == nullptr) invalid(std::string("expected a ") + name + ", found NULL");
    if (given->size < offsetof(T, api_version) + sizeof(uint32_t)) {
        invalid(std::string(name) + ": expected a size of " + std::to_string(sizeof(T)) +
                ", found " + std::to_string(given->size) + ": begin with MOEINF_INIT");
    }
    check_version(given->api_version);
}

// A caller's struct. Fields that it does not have are zero; those that only it has must be.
template <class T>
[[nodiscard]] T read_struct(const T* given, const char* name) {
    check_head(given, name);
    T own{};
    std::memcpy(&own, given, std::min(given->size, sizeof(T)));
    const auto* const bytes = reinterpret_cast<const std::byte*>(given);
    for (size_t at = sizeof(T); at < given->size; ++at) {
        if (bytes[at] != std::byte{0}) {
            invalid(std::string(name) +
                    ": found a field that this library does not know, at byte " +
                    std::to_string(at));
        }
    }
    return own;
}

// As much of the result as the caller's struct has room for. Its head stays as it is.
template <class T>
void write_struct(T own, T* given) {
    own.size = given->size;
    own.api_version = given->api_version;
    std::memcpy(given, &own, std::min(given->size, sizeof(T)));
}

template <class T>
void check_given(const T* pointer, const char* name) {
    if (pointer == nullptr) invalid(std::string("expected ") + name + ", found NULL");
}

[[nodiscard]] inline std::string text_or(const char* given, const char* usual) {
    return given == nullptr ? usual : given;
}

}  // namespace moeinf::capi
