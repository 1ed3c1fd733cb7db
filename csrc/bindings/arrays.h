// NumPy arrays as spans, and spans as NumPy arrays.
#pragma once

#include <pybind11/numpy.h>

#include <span>

namespace moeinf {

template <class T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

template <class T>
std::span<const T> values(const Array<T>& array) {
    return {array.data(), static_cast<size_t>(array.size())};
}

template <class T>
pybind11::array_t<T> copied(std::span<const T> source) {
    return pybind11::array_t<T>(static_cast<pybind11::ssize_t>(source.size()), source.data());
}

}  // namespace moeinf
