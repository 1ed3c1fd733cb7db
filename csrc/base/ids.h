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

// The ids from `first` to before `end`, for a range-based loop.
template <class Id>
class IdRange {
public:
    struct Iterator {
        int32_t at;
        constexpr Id operator*() const noexcept { return Id{at}; }
        constexpr Iterator& operator++() noexcept {
            ++at;
            return *this;
        }
        bool operator==(const Iterator&) const = default;
    };

    constexpr IdRange(int32_t first, int32_t end) noexcept : first_(first), end_(end) {}
    [[nodiscard]] constexpr Iterator begin() const noexcept { return {first_}; }
    [[nodiscard]] constexpr Iterator end() const noexcept { return {end_}; }

private:
    int32_t first_, end_;
};

// The first `count` ids of one kind.
template <class Id>
[[nodiscard]] constexpr IdRange<Id> all_ids(int32_t count) noexcept {
    return {0, count};
}

// How many MoE layers a model has, and how many experts each: the three ids of an expert.
struct ModelShape {
    int32_t num_layers = 0;
    int32_t num_experts = 0;  // per layer

    [[nodiscard]] constexpr int32_t total() const noexcept { return num_layers * num_experts; }
    [[nodiscard]] constexpr LayerId layer_of(ExpertId expert) const noexcept {
        return LayerId{number(expert) / num_experts};
    }
    [[nodiscard]] constexpr ExpertIndex index_of(ExpertId expert) const noexcept {
        return ExpertIndex{number(expert) % num_experts};
    }
    [[nodiscard]] constexpr ExpertId id(LayerId layer, ExpertIndex expert) const noexcept {
        return ExpertId{number(layer) * num_experts + number(expert)};
    }
    // Where the experts of a layer begin in an array by flat id.
    [[nodiscard]] constexpr size_t begin_of(LayerId layer) const noexcept {
        return index(layer) * static_cast<size_t>(num_experts);
    }
    [[nodiscard]] constexpr IdRange<LayerId> layers() const noexcept { return {0, num_layers}; }
    [[nodiscard]] constexpr IdRange<ExpertId> experts() const noexcept { return {0, total()}; }
    [[nodiscard]] constexpr IdRange<ExpertId> experts_of(LayerId layer) const noexcept {
        return {number(layer) * num_experts, (number(layer) + 1) * num_experts};
    }
    // The layer that is computed `distance` after this one; the first follows the last.
    [[nodiscard]] constexpr LayerId after(LayerId layer, int32_t distance) const noexcept {
        return LayerId{(number(layer) + distance) % num_layers};
    }

    bool operator==(const ModelShape&) const = default;
};

// A vector with one element for each id of one kind.
template <class Id, class T>
class PerId {
public:
    PerId() = default;
    explicit PerId(size_t count, const T& value = T()) : values_(count, value) {}
    explicit PerId(int32_t count, const T& value = T())
        : PerId(static_cast<size_t>(count), value) {}

    [[nodiscard]] decltype(auto) operator[](Id id) { return values_[index(id)]; }
    [[nodiscard]] decltype(auto) operator[](Id id) const { return values_[index(id)]; }
    [[nodiscard]] size_t size() const noexcept { return values_.size(); }
    void resize(int32_t count, const T& value) {
        values_.resize(static_cast<size_t>(count), value);
    }

    // The elements in the order of ids.
    [[nodiscard]] auto begin() noexcept { return values_.begin(); }
    [[nodiscard]] auto begin() const noexcept { return values_.begin(); }
    [[nodiscard]] auto end() noexcept { return values_.end(); }
    [[nodiscard]] auto end() const noexcept { return values_.end(); }
    [[nodiscard]] T* data() noexcept { return values_.data(); }
    [[nodiscard]] const T* data() const noexcept { return values_.data(); }

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
