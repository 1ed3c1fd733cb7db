// Caches for C.
#include <limits>
#include <string_view>
#include <utility>

#include "capi/border.h"
#include "capi/objects.h"
#include "cuda/cuda.h"
#include "tier/device_link.h"

namespace moeinf::capi {

Handles<moeinf_cache, Cache>& caches() {
    static auto* const kept = new Handles<moeinf_cache, Cache>("moeinf_cache");
    return *kept;
}

const ExpertFfn& Cache::expert() const {
    if (!store->expert) invalid("the store does not say what an expert computes");
    if (core.device_link() != nullptr) {
        throw Error(ErrorCode::kUnsupported, "the CPU cannot compute out of slots of a GPU");
    }
    return *store->expert;
}

TimelinePtr Cache::timeline_of(Stream stream) {
    const std::lock_guard lock(mutex);
    TimelinePtr& found = timelines[stream];
    if (found == nullptr) {
        found = std::make_shared<Timeline>(core.device_link()->device(), stream, false);
    }
    return found;
}

namespace {

std::shared_ptr<Device> open_device(std::string_view name) {
    if (name == "cpu") return nullptr;
    if (name == "cuda") return open_cuda_device(0);
    constexpr std::string_view kPrefix = "cuda:";
    if (name.starts_with(kPrefix) && name.size() == kPrefix.size() + 1 && name.back() >= '0' &&
        name.back() <= '9') {
        return open_cuda_device(name.back() - '0');
    }
    std::string message = "expected cpu, cuda or cuda:N, found ";
    invalid(message.append(name));
}

std::vector<ExpertIndex> read_experts(const int32_t* experts, int32_t count) {
    if (count < 0) invalid("expected a number of experts, found " + std::to_string(count));
    if (count > 0) check_given(experts, "experts");
    std::vector<ExpertIndex> found;
    for (int32_t i = 0; i < count; ++i) found.push_back(ExpertIndex{experts[i]});
    return found;
}

}  // namespace
}  // namespace moeinf::capi

using namespace moeinf;
using namespace moeinf::capi;

extern "C" {

moeinf_status moeinf_cache_create(moeinf_store* store, const moeinf_cache_options* options,
                                  moeinf_cache** cache) {
    return guarded([&] {
        check_given(cache, "a place for the cache");
        const moeinf_cache_options given = read_struct(options, "moeinf_cache_options");
        std::shared_ptr<Store> kept = stores().get(store);
        const int32_t all = kept->catalog->total_experts();
        ExpertCacheOptions own;
        own.slots = given.slots == 0 ? all : given.slots;
        own.policy = text_or(given.policy, "learned");
        own.prefetch = text_or(given.prefetch, "off");
        own.shared = text_or(given.shared, "");
        own.copy = {given.reader_threads, given.chunk_bytes, given.through_page_cache == 0};
        own.device = open_device(text_or(given.device, "cpu"));
        own.host_slots = given.host_slots == 0 && own.device != nullptr ? all : given.host_slots;
        own.exclusive = given.exclusive != 0;
        own.gather_below = given.gather_below;
        *cache = caches().add(std::make_shared<Cache>(std::move(kept), std::move(own)));
    });
}

moeinf_status moeinf_cache_destroy(moeinf_cache* cache) {
    return guarded([&] { (void)caches().take_unused(cache); });
}

moeinf_status moeinf_cache_get_pool(moeinf_cache* cache, moeinf_pool* pool) {
    return guarded([&] {
        check_head(pool, "moeinf_pool");
        const auto own = caches().get(cache);
        moeinf_pool found{};
        found.base = own->core.pool().data();
        found.slot_bytes = own->core.pool().slot_bytes();
        found.slots = own->core.slots();
        write_struct(found, pool);
    });
}

moeinf_status moeinf_cache_resize(moeinf_cache* cache, int32_t slots) {
    return guarded([&] { caches().get(cache)->core.resize(slots); });
}

moeinf_status moeinf_cache_prefetch(moeinf_cache* cache, int32_t layer, const int32_t* experts,
                                    int32_t count, int32_t* started) {
    return guarded([&] {
        const auto own = caches().get(cache);
        const int32_t reads = own->core.prefetch(LayerId{layer}, read_experts(experts, count));
        if (started != nullptr) *started = reads;
    });
}

moeinf_status moeinf_cache_predict(moeinf_cache* cache, int32_t layer, const int32_t* experts,
                                   int32_t count) {
    return guarded(
        [&] { caches().get(cache)->core.predict(LayerId{layer}, read_experts(experts, count)); });
}

moeinf_status moeinf_cache_get_stats(moeinf_cache* cache, int32_t layer, moeinf_stats* stats) {
    return guarded([&] {
        check_head(stats, "moeinf_stats");
        const auto own = caches().get(cache);
        const int32_t layers = own->core.catalog().num_layers();
        if (layer < -1 || layer >= layers) {
            invalid("expected a layer in 0.." + std::to_string(layers - 1) + ", or -1, found " +
                    std::to_string(layer));
        }
        moeinf_stats sum{};
        const PerLayer<LayerStats> rows = own->core.stats();
        for (const LayerId one : own->core.catalog().shape().layers()) {
            if (layer != -1 && number(one) != layer) continue;
            const LayerStats& row = rows[one];
            sum.accesses += row.accesses;
            sum.hits += row.hits;
            sum.misses += row.misses;
            sum.evictions += row.evictions;
            sum.demand_bytes += row.demand_bytes;
            sum.prefetch_bytes += row.prefetch_bytes;
            sum.prefetch_useful_bytes += row.prefetch_useful_bytes;
            sum.prefetch_wasted_bytes += row.prefetch_wasted_bytes;
            sum.stall_seconds += row.stall_seconds;
        }
        write_struct(sum, stats);
    });
}

moeinf_status moeinf_cache_reset_stats(moeinf_cache* cache) {
    return guarded([&] { caches().get(cache)->core.reset_stats(); });
}
}
