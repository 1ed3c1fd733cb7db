// The experts on the CPU for C.
#include <algorithm>
#include <utility>

#include "capi/border.h"
#include "capi/objects.h"
#include "experts/fused_experts.h"

namespace moeinf::capi {

Handles<moeinf_engine, CpuEngine>& engines() {
    static auto* const kept = new Handles<moeinf_engine, CpuEngine>("moeinf_engine");
    return *kept;
}

namespace {

DType read_dtype(moeinf_dtype given) {
    switch (given) {
        case MOEINF_BF16:
            return DType::kBF16;
        case MOEINF_F16:
            return DType::kF16;
        case MOEINF_F32:
            return DType::kF32;
    }
    invalid("expected a moeinf_dtype, found " + std::to_string(static_cast<int>(given)));
}

struct Call {
    FfnInput input;
    DType out_dtype;
};

Call read_call(const moeinf_ffn& given, int32_t num_experts) {
    if (given.tokens > 0) {
        check_given(given.hidden, "hidden");
        check_given(given.topk_ids, "topk_ids");
        check_given(given.topk_weights, "topk_weights");
        check_given(given.out, "out");
    }
    if (given.tokens < 0 || given.top_k < 1) {
        invalid("moeinf_ffn: expected tokens and a top_k of 1 or more, found " +
                std::to_string(given.tokens) + " and " + std::to_string(given.top_k));
    }
    return {{.hidden = given.hidden,
             .hidden_dtype = read_dtype(given.hidden_dtype),
             .topk_ids = given.topk_ids,
             .ids_are_int64 = given.ids_are_int64 != 0,
             .topk_weights = given.topk_weights,
             .topk_weights_dtype = read_dtype(given.topk_weights_dtype),
             .tokens = given.tokens,
             .top_k = given.top_k,
             .num_experts = num_experts},
            read_dtype(given.out_dtype)};
}

void compute_held(const Lease& lease, ExpertFfnCall& call) {
    std::vector<SlotOfExpert> slots;
    for (const ExpertIndex expert : call.experts()) {
        const auto found = std::find(lease.experts.begin(), lease.experts.end(), expert);
        const auto at = static_cast<size_t>(found - lease.experts.begin());
        if (found == lease.experts.end() || !is_some(lease.slots[at])) {
            invalid("topk_ids: expected experts that the lease holds, found " +
                    std::to_string(number(expert)));
        }
        slots.push_back(
            {static_cast<int32_t>(slots.size()), lease.cache->core.pool().slot(lease.slots[at])});
    }
    call.compute(slots);
}

}  // namespace
}  // namespace moeinf::capi

using namespace moeinf;
using namespace moeinf::capi;

extern "C" {

moeinf_status moeinf_engine_create(const moeinf_engine_options* options, moeinf_engine** engine) {
    return guarded([&] {
        check_given(engine, "a place for the engine");
        const moeinf_engine_options given = read_struct(options, "moeinf_engine_options");
        *engine =
            engines().add(std::make_shared<CpuEngine>(given.threads, text_or(given.kernels, "")));
    });
}

moeinf_status moeinf_engine_destroy(moeinf_engine* engine) {
    return guarded([&] { (void)engines().take_unused(engine); });
}

moeinf_status moeinf_fused_experts(moeinf_cache* cache, moeinf_engine* engine,
                                   const moeinf_ffn* ffn) {
    return guarded([&] {
        const moeinf_ffn given = read_struct(ffn, "moeinf_ffn");
        const auto own = caches().get(cache);
        const auto threads = engines().get(engine);
        const Call call = read_call(given, own->core.catalog().num_experts());
        fused_experts(own->core, *threads, own->expert(), call.input,
                      {LayerId{given.layer}, given.prefill != 0, given.new_sequence != 0,
                       caller_of(given.caller)},
                      given.out, call.out_dtype);
    });
}

moeinf_status moeinf_lease_compute(moeinf_lease* lease, moeinf_engine* engine,
                                   const moeinf_ffn* ffn) {
    return guarded([&] {
        const moeinf_ffn given = read_struct(ffn, "moeinf_ffn");
        const auto own = leases().get(lease);
        const auto threads = engines().get(engine);
        const std::lock_guard lock(own->mutex);
        const Call call = read_call(given, own->cache->core.catalog().num_experts());
        const int64_t most = most_tokens(*threads, own->cache->expert(), call.input, 0);
        in_parts(*threads, own->cache->expert(), call.input, given.out, call.out_dtype, most,
                 [&](ExpertFfnCall& part, bool /*first*/) { compute_held(*own, part); });
    });
}
}
