// The feed-forward networks of one MoE layer, computed straight out of slots:
//
//   out[t] = sum over j of topk_weights[t][j] * expert(topk_ids[t][j])(hidden[t])
//   expert(x) = down . (act(gate . x) * (up . x)), or down . act(up . x) where it is not gated
//
// An FfnPass is one such call. It says which experts it needs, computes any of them whenever their
// bytes are at hand, in any order and grouping, and sums up at the end, always in order of j. The
// result has the same bits however the experts came and however many threads worked. The pass knows
// nothing of caches: whoever drives it holds the slots.
//
// Memory: one 32-bit row of `hidden` for each route and one row of `intermediate`; a long prompt is
// cut into passes by the caller, see tokens_per_pass().
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"
#include "compute/cpu_engine.h"
#include "compute/kernels.h"

namespace moeinf {

struct FfnShape {
    int64_t hidden = 0;
    int64_t intermediate = 0;
    DType weights = DType::kBF16;
    Activation activation = Activation::kSilu;
    bool gated = true;
    uint64_t gate_up_offset = 0;  // bytes into a slot: [2I, H], gate rows first, or [I, H]
    uint64_t down_offset = 0;     // bytes into a slot: [H, I]
};

// All arrays contiguous, row-major, and alive until finish() has returned.
struct FfnInput {
    const void* hidden = nullptr;  // [tokens, hidden]
    DType hidden_dtype = DType::kF32;
    const void* topk_ids = nullptr;      // [tokens, top_k], -1 = no expert
    bool ids_are_int64 = true;           // else int32
    const void* topk_weights = nullptr;  // [tokens, top_k]
    DType topk_weights_dtype = DType::kF32;
    int64_t tokens = 0;
    int64_t top_k = 0;
    int32_t num_experts = 0;
};

struct SlotOfExpert {
    int32_t position;  // index into FfnPass::experts()
    const std::byte* slot;
};

class FfnPass {
public:
    // Throws Error(kInvalid) for an id outside [-1, num_experts), naming token, position and id,
    // for a NaN or infinite weight of a routed expert, and for a shape that cannot be.
    FfnPass(CpuEngine& engine, const FfnShape& shape, const FfnInput& input);
    ~FfnPass();
    FfnPass(const FfnPass&) = delete;
    FfnPass& operator=(const FfnPass&) = delete;

    // In-layer ids, distinct, in order of first appearance; and the routes to each.
    [[nodiscard]] std::span<const ExpertIndex> experts() const noexcept { return experts_; }
    [[nodiscard]] std::span<const int32_t> counts() const noexcept { return counts_; }

    // Computes every route of these experts; their slots are not read after it returns. Throws
    // Error(kInvalid) for a position out of range or computed before.
    void compute(std::span<const SlotOfExpert> ready);

    // Writes out [tokens, hidden]. Throws Error(kInvalid) if an expert was never computed.
    void finish(void* out, DType out_dtype);

    // The most tokens (at least 1) whose scratch fits `scratch_bytes`.
    [[nodiscard]] static int64_t tokens_per_pass(const FfnShape& shape, int64_t top_k,
                                                 size_t scratch_bytes = size_t{64} << 20);

private:
    template <class Id>
    void sort_routes(const Id* ids);
    void read_topk_weights();
    [[nodiscard]] const std::byte* activation_row(int64_t token) const;
    template <class Block>
    void run_blocks(std::span<const SlotOfExpert> ready, int64_t rows, int64_t row_bytes,
                    int64_t most_values, const Block& block);
    void gate_up(const SlotOfExpert& expert, int64_t first, int64_t count) const noexcept;
    void down(const SlotOfExpert& expert, int64_t first, int64_t count) const noexcept;

    CpuEngine& engine_;
    const KernelSet& kernels_;
    const FfnShape shape_;
    const FfnInput input_;
    const DType act_dtype_;  // of the products' left operands

    std::vector<ExpertIndex> experts_;
    std::vector<int32_t> counts_;
    std::vector<bool> computed_;
    // Routes sorted by expert: `begin_[p]` is the row of the first route of position p; row_token_
    // maps rows to tokens, row_of_route_ maps t * top_k + j to rows (-1: no expert).
    std::vector<int32_t> begin_;
    std::vector<int32_t> row_token_;
    std::vector<int32_t> row_of_route_;
    std::vector<float> topk_weights_;  // [tokens, top_k]

    ScratchBuffer scratch_;
    float* y_ = nullptr;            // [routes, hidden]: each expert's result
    std::byte* inner_ = nullptr;    // [routes, intermediate] in act_dtype_: act(gate) * up
    const std::byte* x_ = nullptr;  // [tokens, hidden] in act_dtype_; the input itself if it fits
};

}  // namespace moeinf
