// Each error code becomes one Python exception, defined in moeinf.errors.
#include <exception>

#include "base/error.h"
#include "bindings/bindings.h"

namespace moeinf {
namespace {

const char* exception_name(ErrorCode code) {
    switch (code) {
        case ErrorCode::kRead:
            return "ReadError";
        case ErrorCode::kCapacity:
            return "CapacityError";
        case ErrorCode::kUnsupported:
            return "UnsupportedError";
        case ErrorCode::kInvalid:
            break;
    }
    return nullptr;
}

}  // namespace

void bind_errors(pybind11::module_& /*module*/) {
    pybind11::register_exception_translator([](std::exception_ptr pending) {
        try {
            if (pending) std::rethrow_exception(pending);
        } catch (const Error& error) {
            const char* name = exception_name(error.code());
            if (name == nullptr) {
                PyErr_SetString(PyExc_ValueError, error.what());
                return;
            }
            const auto type = pybind11::module_::import("moeinf.errors").attr(name);
            PyErr_SetString(type.ptr(), error.what());
        }
    });
}

}  // namespace moeinf
