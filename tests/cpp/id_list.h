// Ids in tests are written as plain numbers, and printed as such.
#pragma once

#include <initializer_list>
#include <ostream>
#include <ranges>
#include <vector>

#include "base/ids.h"

template <class Id>
struct IdList : std::vector<Id> {
    using std::vector<Id>::vector;
    IdList(std::initializer_list<int32_t> numbers) {
        for (const int32_t number : numbers) this->push_back(Id{number});
    }
    template <std::ranges::range Numbers>
        requires(!std::same_as<std::ranges::range_value_t<Numbers>, Id>)
    explicit IdList(const Numbers& numbers) {
        for (const auto number : numbers) this->push_back(Id{static_cast<int32_t>(number)});
    }
};

using Experts = IdList<moeinf::ExpertIndex>;   // of one layer
using FlatExperts = IdList<moeinf::ExpertId>;  // of all layers

namespace moeinf {

template <class Id>
    requires std::is_enum_v<Id>
std::ostream& operator<<(std::ostream& out, Id id) {
    return out << number(id);
}

}  // namespace moeinf
