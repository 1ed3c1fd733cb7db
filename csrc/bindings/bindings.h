// One function per file of bindings; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace moeinf {

void bind_errors(pybind11::module_& module);
void bind_trace(pybind11::module_& module);

}  // namespace moeinf
