// Ids are plain numbers in Python. Included by every binding with an id in a signature.
#pragma once

#include <pybind11/pybind11.h>

#include <type_traits>

#include "base/ids.h"

namespace moeinf {

template <class T>
inline constexpr bool is_id =
    std::is_same_v<T, LayerId> || std::is_same_v<T, ExpertIndex> || std::is_same_v<T, ExpertId> ||
    std::is_same_v<T, FrameId> || std::is_same_v<T, SlotId>;

}  // namespace moeinf

template <class Id>
struct pybind11::detail::type_caster_enum_type_enabled<Id, std::enable_if_t<moeinf::is_id<Id>>>
    : std::false_type {};

template <class Id>
class pybind11::detail::type_caster<Id, std::enable_if_t<moeinf::is_id<Id>>> {
public:
    PYBIND11_TYPE_CASTER(Id, const_name("int"));

    bool load(handle source, bool convert) {
        type_caster<int32_t> number;
        if (!number.load(source, convert)) return false;
        value = Id{cast_op<int32_t>(number)};
        return true;
    }
    static handle cast(Id id, return_value_policy /*policy*/, handle /*parent*/) {
        return PyLong_FromLong(moeinf::number(id));
    }
};
