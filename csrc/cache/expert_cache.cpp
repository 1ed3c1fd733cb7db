#include "cache/expert_cache.h"

#include "base/error.h"
#include "base/ranges.h"
#include "cache/cache_state.h"
#include "tier/device_link.h"

namespace moeinf {
namespace {

// In a forked child the state stays as it is: threads, locks and waiters are not there to be ended.
struct Dispose {
    void operator()(CacheState* state) const {
        if (!state->forked()) std::default_delete<CacheState>()(state);
    }
};

void check_layer(const Catalog& catalog, LayerId layer) {
    if (!is_some(layer) || number(layer) >= catalog.num_layers()) {
        throw Error(ErrorCode::kInvalid, "expected a layer in 0.." +
                                             std::to_string(catalog.num_layers() - 1) + ", found " +
                                             std::to_string(number(layer)));
    }
}

// Experts of the next layer are read ahead only if few of them can be in vain.
bool is_nearly_all(size_t used, int32_t num_experts) {
    return 20 * static_cast<int64_t>(used) >= 19 * static_cast<int64_t>(num_experts);
}

ExpertId flat_id(const Catalog& catalog, LayerId layer, ExpertIndex expert) {
    if (!is_some(expert) || number(expert) >= catalog.num_experts()) {
        throw Error(ErrorCode::kInvalid, "expected experts in 0.." +
                                             std::to_string(catalog.num_experts() - 1) +
                                             " of layer " + std::to_string(number(layer)) +
                                             ", found " + std::to_string(number(expert)));
    }
    return catalog.shape().id(layer, expert);
}

}  // namespace

ExpertCache::ExpertCache(std::shared_ptr<const Catalog> catalog, ExpertCacheOptions options)
    : state_(std::make_unique<CacheState>(std::move(catalog), std::move(options)).release(),
             Dispose()) {}

ExpertCache::~ExpertCache() = default;

StepLease ExpertCache::begin_step(const StepRequest& request) {
    const Range range("moeinf acquire");
    CacheState& cache = *state_;
    cache.check_process();
    const Catalog& catalog = cache.catalog();
    const size_t count = request.experts.size();
    check_layer(catalog, request.layer);
    if (!request.counts.empty() && request.counts.size() != count) {
        throw Error(ErrorCode::kInvalid, "expected " + std::to_string(count) + " counts, found " +
                                             std::to_string(request.counts.size()));
    }
    if (!request.recent.empty() &&
        (request.recent.size() != count || request.counts.size() != count)) {
        throw Error(ErrorCode::kInvalid, "expected " + std::to_string(count) +
                                             " counts and uses by the latest tokens, found " +
                                             std::to_string(request.counts.size()) + " and " +
                                             std::to_string(request.recent.size()));
    }

    StepLease step(state_);  // before the lock, which its destructor takes
    std::unique_lock lock(cache.tier.mutex);
    ++cache.requests;
    cache.flat_ids.clear();
    for (const ExpertIndex expert : request.experts) {
        const ExpertId flat = flat_id(catalog, request.layer, expert);
        CacheState::Seen& seen = cache.seen[flat];
        if (seen.request == cache.requests) {
            throw Error(ErrorCode::kInvalid,
                        "expert " + std::to_string(number(expert)) + " of layer " +
                            std::to_string(number(request.layer)) + " is named twice in one step");
        }
        seen = {cache.requests, static_cast<int32_t>(cache.flat_ids.size())};
        cache.flat_ids.push_back(flat);
    }
    if (request.all_at_once && count > static_cast<size_t>(cache.tier.residency().frames())) {
        throw Error(ErrorCode::kCapacity,
                    "a step of " + std::to_string(count) + " experts at once does not fit into " +
                        std::to_string(cache.tier.residency().frames()) + " slots");
    }
    if (cache.ones.size() < count) cache.ones.resize(count, 1);

    if (cache.unused.empty()) {
        step.impl_ = std::make_unique<StepLease::Impl>();
    } else {
        step.impl_ = std::move(cache.unused.back());
        cache.unused.pop_back();
    }
    StepLease::Impl& lease = *step.impl_;
    lease.layer = request.layer;
    lease.members.resize(count);
    for (size_t i = 0; i < count; ++i) {
        Member& member = lease.members[i];
        member.expert = cache.flat_ids[i];
        member.staging = -1;
        member.state = Member::State::kPending;
    }
    lease.to_hand_out = count;
    lease.pending = count;
    lease.next_pending = 0;
    lease.thread = std::this_thread::get_id();
    lease.passes_on = !request.recent.empty() && cache.link == nullptr;
    lease.next_layer = ExpertId{0};
    lease.layer_end = ExpertId{0};
    if (lease.passes_on && request.reads_ahead && is_nearly_all(count, catalog.num_experts()) &&
        number(request.layer) + 1 < catalog.num_layers()) {
        const LayerId next{number(request.layer) + 1};
        lease.next_layer = catalog.shape().id(next, ExpertIndex{0});
        lease.layer_end = ExpertId{number(lease.next_layer) + catalog.num_experts()};
    }
    lease.released = false;
    lease.failure.clear();
    lease.active_index = cache.active.size();
    cache.active.push_back(&lease);

    const Step seen{.index = cache.steps++,
                    .layer = request.layer,
                    .experts = cache.flat_ids,
                    .counts = request.counts.empty()
                                  ? std::span<const int32_t>(cache.ones).first(count)
                                  : request.counts,
                    .recent = request.recent,
                    .router = {},
                    .prefill = request.prefill,
                    .new_sequence = request.new_sequence,
                    .caller = request.caller};
    if (cache.prefetcher) cache.prefetcher->on_step(seen, seconds_now());
    if (cache.link != nullptr) cache.link->host().observe(seen);
    cache.tier.residency().plan(seen, cache.plan);
    const auto member_of = [&](ExpertId expert) -> Member& {
        return lease.members[static_cast<size_t>(cache.seen[expert].position)];
    };
    LayerStats& stats = cache.stats[request.layer];
    for (const ExpertId expert : cache.plan.hits) {
        if (cache.tier.fill_of(expert) == nullptr) ++stats.hits;
        cache.join(lease, member_of(expert));
    }
    for (const Placement& placement : cache.plan.placements) {
        cache.fetch(lease, member_of(placement.expert), placement);
    }
    stats.accesses += static_cast<int64_t>(count);
    stats.misses = stats.accesses - stats.hits;
    if (!request.all_at_once) cache.start_surplus(lease);
    if (cache.prefetcher) {
        for (const Placement& one : cache.plan.placements)
            cache.prefetcher->on_demand_miss(one.expert);
        for (const ExpertId expert : cache.plan.surplus) cache.prefetcher->on_demand_miss(expert);
        cache.prefetcher->look_ahead(seen, seconds_now());
        cache.start_prefetches();
    }
    lock.unlock();
    cache.flush();
    return step;
}

int32_t ExpertCache::prefetch(LayerId layer, std::span<const ExpertIndex> experts) {
    CacheState& cache = *state_;
    cache.check_process();
    check_layer(cache.catalog(), layer);
    for (const ExpertIndex expert : experts) (void)flat_id(cache.catalog(), layer, expert);

    std::unique_lock lock(cache.tier.mutex);
    int32_t started = 0;
    for (const ExpertIndex expert : experts) {
        const ExpertId flat = flat_id(cache.catalog(), layer, expert);
        if (cache.tier.residency().resident(flat)) continue;
        ExpertId evicted{};
        if (!cache.prefetch(flat, evicted)) break;
        ++started;
    }
    lock.unlock();
    cache.flush();
    return started;
}

void ExpertCache::predict(LayerId layer, std::span<const ExpertIndex> experts) {
    CacheState& cache = *state_;
    cache.check_process();
    check_layer(cache.catalog(), layer);
    std::vector<ExpertId> flat;
    for (const ExpertIndex expert : experts)
        flat.push_back(flat_id(cache.catalog(), layer, expert));

    std::unique_lock lock(cache.tier.mutex);
    if (!cache.prefetcher) return;
    cache.prefetcher->on_external(layer, flat);
    if (cache.prefetcher->is_next(layer)) cache.start_prefetches();
    lock.unlock();
    cache.flush();
}

bool ExpertCache::wants_predictions() const {
    state_->check_process();
    const std::lock_guard lock(state_->tier.mutex);
    return state_->prefetcher && state_->prefetcher->wants_external();
}

void ExpertCache::resize(int32_t slots) {
    CacheState& cache = *state_;
    Tier& tier = cache.tier;
    cache.check_process();
    const int32_t total = cache.catalog().total_experts();
    if (slots < 1 || slots > total) {
        throw Error(ErrorCode::kInvalid, "a cache for " + std::to_string(total) +
                                             " experts needs 1 to " + std::to_string(total) +
                                             " slots, not " + std::to_string(slots));
    }
    if (cache.segment != nullptr) {
        throw Error(ErrorCode::kInvalid, "shared memory always has a slot for each expert");
    }
    std::unique_lock lock(tier.mutex);
    while (tier.resizing) cache.wait(lock);
    const int32_t before = tier.residency().frames();
    if (slots < before) tier.compact(slots);
    const int32_t held = cache.slots_held_by_this_thread(nullptr, slots);
    if (held > 0) {
        throw Error(ErrorCode::kCapacity, "cannot shrink from " + std::to_string(before) + " to " +
                                              std::to_string(slots) +
                                              " slots: this thread's own leases hold " +
                                              std::to_string(held) + " of those that would go");
    }

    // From here on no other thread resizes. The pool's memory changes without the lock: nobody
    // touches the slots in question then.
    tier.resizing = true;
    const auto finish = [&](int32_t frames) {
        tier.set_frames(frames);
        tier.resizing = false;
        tier.changed.notify_all();
    };
    try {
        if (slots < before) tier.close_frames(lock, slots, cache.poll);
        lock.unlock();
        tier.pool().resize(tier.slots_with(slots));
        lock.lock();
    } catch (...) {
        if (!lock.owns_lock()) lock.lock();
        finish(before);
        throw;
    }
    finish(slots);
}

void ExpertCache::set_priors(std::span<const float> priors) {
    const auto total = static_cast<size_t>(state_->catalog().total_experts());
    if (priors.size() != total) {
        throw Error(ErrorCode::kInvalid, "expected " + std::to_string(total) + " priors, found " +
                                             std::to_string(priors.size()));
    }
    const std::lock_guard guard(state_->tier.mutex);
    state_->tier.residency().policy().set_priors(priors);
}

Eamc ExpertCache::eamc() const {
    state_->check_process();
    const std::lock_guard lock(state_->tier.mutex);
    std::unique_ptr<Collection> collection = state_->tier.residency().policy().collection();
    if (!collection && state_->prefetcher && state_->prefetcher->predictor() != nullptr) {
        collection = state_->prefetcher->predictor()->collection();
    }
    auto* const eamc = dynamic_cast<Eamc*>(collection.get());
    if (eamc == nullptr) {
        throw Error(ErrorCode::kInvalid,
                    "this cache keeps no collection: neither its policy nor its prefetch is 'eam'");
    }
    return std::move(*eamc);
}

void ExpertCache::reset_stats() {
    state_->check_process();
    const std::lock_guard lock(state_->tier.mutex);
    for (LayerStats& layer : state_->stats) layer = {};
    if (state_->prefetcher) state_->prefetcher->reset_stats();
    if (state_->link != nullptr) {
        state_->link->reset_stats();
        state_->link->host().reset_stats();
    }
}

PerLayer<LayerStats> ExpertCache::stats() const {
    state_->check_process();
    const std::lock_guard lock(state_->tier.mutex);
    return state_->stats;
}

PredictionStats ExpertCache::prediction_stats() const {
    state_->check_process();
    const std::lock_guard lock(state_->tier.mutex);
    return state_->prefetcher ? state_->prefetcher->stats() : PredictionStats{};
}

std::vector<ExpertIndex> ExpertCache::resident(LayerId layer) const {
    state_->check_process();
    check_layer(state_->catalog(), layer);
    const ModelShape shape = state_->catalog().shape();
    const std::lock_guard lock(state_->tier.mutex);
    std::vector<ExpertIndex> experts;
    for (const ExpertId expert : shape.experts_of(layer)) {
        if (state_->tier.is_ready(expert)) experts.push_back(shape.index_of(expert));
    }
    return experts;
}

int32_t ExpertCache::slots() const {
    state_->check_process();
    const std::lock_guard lock(state_->tier.mutex);
    return state_->tier.residency().frames();
}

const SlotPool& ExpertCache::pool() const noexcept {
    return state_->tier.pool();
}

std::shared_ptr<const SlotPool> ExpertCache::shared_pool() const noexcept {
    return state_->tier.shared_pool();
}

const Catalog& ExpertCache::catalog() const noexcept {
    return state_->catalog();
}

std::string ExpertCache::policy() const {
    const std::lock_guard lock(state_->tier.mutex);
    return std::string(state_->tier.residency().policy().name());
}

const FileReader& ExpertCache::files() const noexcept {
    return *state_->files;
}

DeviceLink* ExpertCache::device_link() const noexcept {
    return state_->link;
}

}  // namespace moeinf
