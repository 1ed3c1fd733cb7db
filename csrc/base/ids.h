// Strong index types. Mixing an expert with a slot, or a flat id with an id in its layer, does not
// compile; an array that belongs to one kind of id is indexed by it and needs no cast.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moeinf {

enum class LayerId : int32_t { kNone = -1 };      // MoE layer, counted from 0
enum class ExpertIndex : int32_t { kNone = -1 };  // expert within its layer, as the router says
enum class ExpertId : int32_t { kNone = -1 };     // flat: layer * num_experts + index
enum class FrameId : int32_t { kNone = -1 };      // entry of a residency map; a slot table maps it
enum class SlotId : int32_t { kNone = -1 };       // physical place in a pool

// The number itself, for arithmetic, messages and bindings.
template <class Id>
[[nodiscard]] constexpr int32_t number(Id id) noexcept {
    return static_cast<int32_t>(id);
}

// A position in an array. The id must not be kNone.
template <class Id>
[[nodiscard]] constexpr size_t index(Id id) noexcept {
    return static_cast<size_t>(number(id));
}

template <class Id>
[[nodiscard]] constexpr bool is_some(Id id) noexcept {
    return number(id) >= 0;
}

// A vector with one element for each id of one kind.
template <class Id, class T>
class PerId {
public:
    PerId() = default;
    explicit PerId(size_t count, const T& value = T()) : values_(count, value) {}

    [[nodiscard]] decltype(auto) operator[](Id id) { return values_[index(id)]; }
    [[nodiscard]] decltype(auto) operator[](Id id) const { return values_[index(id)]; }
    [[nodiscard]] size_t size() const noexcept { return values_.size(); }
    [[nodiscard]] std::vector<T>& values() noexcept { return values_; }
    [[nodiscard]] const std::vector<T>& values() const noexcept { return values_; }

private:
    std::vector<T> values_;
};

template <class T>
using PerExpert = PerId<ExpertId, T>;
template <class T>
using PerFrame = PerId<FrameId, T>;
template <class T>
using PerSlot = PerId<SlotId, T>;
template <class T>
using PerLayer = PerId<LayerId, T>;

}  // namespace moeinf
