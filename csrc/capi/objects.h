// What handles stand for.
#pragma once

#include <moeinf.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cache/expert_cache.h"
#include "capi/handles.h"
#include "compute/cpu_engine.h"
#include "compute/expert_ffn.h"
#include "device/timeline.h"
#include "layout/catalog.h"

namespace moeinf::capi {

struct Store {
    std::shared_ptr<const Catalog> catalog;
    std::optional<ExpertFfn> expert;  // none: the library never computes these experts
};

struct Cache {
    Cache(std::shared_ptr<Store> of, ExpertCacheOptions options)
        : store(std::move(of)), core(store->catalog, std::move(options)) {}

    const std::shared_ptr<Store> store;  // kept: it cannot be destroyed before its caches
    ExpertCache core;
    std::mutex mutex;                         // guards the next
    std::map<Stream, TimelinePtr> timelines;  // of the streams that read slots

    [[nodiscard]] const ExpertFfn& expert() const;
    [[nodiscard]] TimelinePtr timeline_of(Stream stream);
};

struct Lease {
    std::shared_ptr<Cache> cache;
    std::mutex mutex;  // calls take turns
    std::vector<ExpertIndex> experts;
    std::vector<SlotId> slots;  // of each expert; kNone: not handed out, or released
    int32_t left;               // not handed out
    StepLease step;
};

Handles<moeinf_store, Store>& stores();
Handles<moeinf_cache, Cache>& caches();
Handles<moeinf_lease, Lease>& leases();
Handles<moeinf_engine, CpuEngine>& engines();

// Who runs a pass: 0 means the calling thread.
[[nodiscard]] int64_t caller_of(int64_t given);

[[nodiscard]] ScaleType scale_type_of(const std::string& name);

// Throws Error(kInvalid), naming the matrix.
[[nodiscard]] ExpertFfn read_expert(const moeinf_expert& given);

}  // namespace moeinf::capi
