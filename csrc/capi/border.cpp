#include "capi/border.h"

#include <exception>
#include <new>

#include "capi/handles.h"

namespace moeinf::capi {
namespace {

thread_local std::string last_error;

moeinf_status status_of(ErrorCode code) {
    switch (code) {
        case ErrorCode::kInvalid:
            return MOEINF_INVALID;
        case ErrorCode::kRead:
            return MOEINF_READ;
        case ErrorCode::kCapacity:
            return MOEINF_CAPACITY;
        case ErrorCode::kUnsupported:
            return MOEINF_UNSUPPORTED;
    }
    return MOEINF_INVALID;
}

moeinf_status keep(moeinf_status status, const char* message) noexcept {
    try {
        last_error = message;
    } catch (const std::bad_alloc&) {
        last_error.clear();
    }
    return status;
}

}  // namespace

moeinf_status status_of_exception() noexcept {
    try {
        throw;
    } catch (const Error& error) {
        return keep(status_of(error.code()), error.what());
    } catch (const InUse& error) {
        return keep(MOEINF_IN_USE, error.what());
    } catch (const std::bad_alloc&) {
        return keep(MOEINF_CAPACITY, "out of memory");
    } catch (const std::exception& error) {
        return keep(MOEINF_UNSUPPORTED, error.what());
    } catch (...) {
        return keep(MOEINF_UNSUPPORTED, "an unknown exception");
    }
}

void check_version(uint32_t version) {
    if (version >= 1 && version <= MOEINF_API_VERSION) return;
    throw Error(ErrorCode::kUnsupported, "expected version 1 to " +
                                             std::to_string(MOEINF_API_VERSION) +
                                             " of the interface, found " + std::to_string(version) +
                                             ": compile with the header of this library");
}

}  // namespace moeinf::capi

extern "C" {

uint32_t moeinf_api_version(void) {
    return MOEINF_API_VERSION;
}

const char* moeinf_version(void) {
    return MOEINF_VERSION;
}

const char* moeinf_last_error(void) {
    return moeinf::capi::last_error.c_str();
}
}
