// What must not compile: an id of one kind where another, or a plain number, is expected. Each line
// names a mistake; that it fails to compile is itself compiled here.
#include <type_traits>

#include "check.h"
#include "device/slot_fences.h"
#include "memory/slot_pool.h"
#include "policy/residency.h"

using namespace moeinf;

namespace {

template <class Array, class Id>
concept indexed_by = requires(Array& array, Id id) { array[id]; };
template <class Call, class... Arguments>
concept takes = std::is_invocable_v<Call, Arguments...>;

template <class From, class... To>
constexpr bool stays_apart_from = (!std::is_convertible_v<From, To> && ...);

static_assert(stays_apart_from<ExpertId, LayerId, ExpertIndex, FrameId, SlotId, int32_t, size_t>);
static_assert(stays_apart_from<ExpertIndex, LayerId, ExpertId, FrameId, SlotId, int32_t, size_t>);
static_assert(stays_apart_from<LayerId, ExpertIndex, ExpertId, FrameId, SlotId, int32_t, size_t>);
static_assert(stays_apart_from<FrameId, LayerId, ExpertIndex, ExpertId, SlotId, int32_t, size_t>);
static_assert(stays_apart_from<SlotId, LayerId, ExpertIndex, ExpertId, FrameId, int32_t, size_t>);
static_assert(stays_apart_from<int32_t, LayerId, ExpertIndex, ExpertId, FrameId, SlotId>);

static_assert(indexed_by<PerExpert<float>, ExpertId>);
static_assert(!indexed_by<PerExpert<float>, ExpertIndex>);
static_assert(!indexed_by<PerExpert<float>, FrameId>);
static_assert(!indexed_by<PerExpert<float>, size_t>);
static_assert(!indexed_by<PerFrame<float>, SlotId>);
static_assert(!indexed_by<PerSlot<float>, FrameId>);
static_assert(!indexed_by<PerLayer<float>, ExpertId>);

// A frame is a place on paper, a slot has bytes.
static_assert(takes<decltype(&SlotPool::slot), const SlotPool&, SlotId>);
static_assert(!takes<decltype(&SlotPool::slot), const SlotPool&, FrameId>);
static_assert(!takes<decltype(&SlotFences::arrived), SlotFences&, FrameId>);
static_assert(!takes<decltype(&Residency::exchange), Residency&, SlotId, SlotId>);
// A router's expert must be made a flat one first.
static_assert(!takes<decltype(&Residency::frame_of), const Residency&, ExpertIndex>);
static_assert(!takes<decltype(&Residency::frame_of), const Residency&, int32_t>);

TEST("the three ids of an expert agree") {
    const ModelShape shape{3, 7};
    for (const LayerId layer : shape.layers()) {
        size_t position = shape.begin_of(layer);
        for (const ExpertId expert : shape.experts_of(layer)) {
            CHECK(shape.layer_of(expert) == layer);
            CHECK(shape.id(layer, shape.index_of(expert)) == expert);
            CHECK_EQ(index(expert), position++);
        }
    }
    CHECK(shape.after(LayerId{2}, 1) == LayerId{0});
}

}  // namespace

int main(int argc, char** argv) {
    return run_tests(argc, argv);
}
