// The feed-forward networks of one MoE layer, computed straight out of slots:
//
//   out[t] = sum over j of topk_weights[t][j] * expert(topk_ids[t][j])(hidden[t])
//   expert(x) = down(gate function(gate(x), up(x))); each matrix may have a bias
//
// An ExpertFfnCall is one such call. It names the experts that it needs, computes any of them when
// their bytes are ready, in any order and grouping, and sums at the end, always in the order of j.
// The result has the same bits for every order of experts and every number of threads. The call
// knows no cache: its user holds the slots.
//
// Memory: one 32-bit row of `hidden` and one row of `intermediate` for each route. The user divides
// a long prompt into several calls, see tokens_per_call().
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/routing.h"
#include "compute/cpu_engine.h"
#include "cpu_kernels/gate.h"
#include "cpu_kernels/kernels.h"
#include "layout/matrix.h"

namespace moeinf {

// The computation of an expert, and the place of its matrices in a slot.
struct ExpertFfn {
    // gate and up [intermediate, hidden], down [hidden, intermediate]. Throws Error(kInvalid),
    // naming the matrix, for sizes that do not fit together, for offsets and strides that its
    // format cannot have, and for an up, scales or biases that are missing or not wanted.
    ExpertFfn(Matrix gate, std::optional<Matrix> up, Matrix down, Gate function);

    [[nodiscard]] int64_t hidden() const noexcept { return down.rows; }
    [[nodiscard]] int64_t intermediate() const noexcept { return down.cols; }

    Matrix gate;
    std::optional<Matrix> up;  // none where the gate function has no up
    Matrix down;
    Gate function;
};

// All arrays contiguous, row-major, and alive until finish() has returned.
struct FfnInput {
    const void* hidden = nullptr;  // [tokens, hidden]
    DType hidden_dtype = DType::kF32;
    const void* topk_ids = nullptr;      // [tokens, top_k], see Routing
    bool ids_are_int64 = true;           // else int32
    const void* topk_weights = nullptr;  // [tokens, top_k]
    DType topk_weights_dtype = DType::kF32;
    int64_t tokens = 0;
    int64_t top_k = 0;
    int32_t num_experts = 0;
    int64_t whole_tokens = 0;  // of the call that this is a part of; 0: it is the whole
};

struct SlotOfExpert {
    int32_t position;  // index into ExpertFfnCall::experts()
    const std::byte* slot;
};

class ExpertFfnCall {
public:
    // Throws Error(kInvalid) for an id that Routing refuses. A NaN in a token, a weight or an
    // expert reaches the tokens it belongs to and no other.
    ExpertFfnCall(CpuEngine& engine, const ExpertFfn& expert, const FfnInput& input);
    ~ExpertFfnCall();
    ExpertFfnCall(const ExpertFfnCall&) = delete;
    ExpertFfnCall& operator=(const ExpertFfnCall&) = delete;

    // In-layer ids, distinct, in order of first appearance; and the routes to each.
    [[nodiscard]] std::span<const ExpertIndex> experts() const noexcept {
        return routing_.experts();
    }
    [[nodiscard]] std::span<const int32_t> counts() const noexcept { return routing_.counts(); }

    [[nodiscard]] int64_t tokens() const noexcept { return input_.tokens; }
    // See Routing::recent().
    [[nodiscard]] std::span<const float> recent(int64_t sequences);

    // Computes every route of these experts; their slots are not read after it returns. Throws
    // Error(kInvalid) for a position out of range or computed before.
    void compute(std::span<const SlotOfExpert> ready);

    // Writes out [tokens, hidden]. Throws Error(kInvalid) if an expert was never computed.
    void finish(void* out, DType out_dtype);

    // The most tokens (at least 1) of such a call whose scratch fits `scratch_bytes`.
    [[nodiscard]] static int64_t tokens_per_call(const KernelSet& kernels, const ExpertFfn& expert,
                                                 const FfnInput& input, size_t scratch_bytes);

private:
    template <class Id>
    void sort_routes(const Id* ids);
    void read_topk_weights();
    // The activations of one matrix, in the order that its product wants.
    struct Activations {
        const Product* product = nullptr;
        size_t offset = 0;  // of row 0 in the scratch memory, where the product arranges them
        size_t row_bytes = 0;
        const std::byte* rows = nullptr;

        [[nodiscard]] const std::byte* row(int64_t index) const noexcept {
            return rows + static_cast<size_t>(index) * row_bytes;
        }
    };
    [[nodiscard]] auto dot_of(const Matrix& matrix, const Activations& x) const noexcept {
        return tiled_ ? kernels_.formats[static_cast<size_t>(matrix.format)].tiles : x.product->dot;
    }
    [[nodiscard]] Activations reserve(const Matrix& matrix, DType dtype, int64_t rows,
                                      size_t& size) const;
    void arrange_inner(std::span<const SlotOfExpert> ready);
    template <class Row>
    void arrange_tiles(std::span<const SlotOfExpert> ready, const Activations& x, int64_t cols,
                       const Row& row_of);
    template <class Block>
    void run_blocks(std::span<const SlotOfExpert> ready, int64_t rows, int64_t row_bytes,
                    int64_t most_values, const Block& block);
    void gate_up(const SlotOfExpert& expert, int64_t first, int64_t count) const noexcept;
    void down(const SlotOfExpert& expert, int64_t first, int64_t count) const noexcept;

    CpuEngine& engine_;
    const KernelSet& kernels_;
    const ExpertFfn expert_;
    const FfnInput input_;
    const GateKernels& gate_kernels_;
    const bool tiled_;         // all three products run on the matrix unit
    const DType x_dtype_;      // of the tokens, as gate and up take them
    const DType inner_dtype_;  // of the gate function's values, as down takes them

    Routing routing_;
    std::vector<bool> computed_;
    // Routes sorted by expert: `begin_[p]` is the row of the first route of position p; row_token_
    // maps rows to tokens, row_of_route_ maps t * top_k + j to rows (-1: no expert).
    std::vector<int32_t> begin_;
    std::vector<int32_t> row_token_;
    std::vector<int32_t> row_of_route_;
    std::vector<float> topk_weights_;  // [tokens, top_k]

    ScratchBuffer scratch_;
    float* y_ = nullptr;            // [routes, hidden]: each expert's result
    std::byte* inner_ = nullptr;    // [routes, intermediate] in inner_dtype_
    const std::byte* x_ = nullptr;  // [tokens, hidden] in x_dtype_; the input itself if it fits
    Activations gate_x_, up_x_;     // [tokens, hidden]; [routes, hidden] where they are tiled
    Activations down_x_;            // [routes, intermediate]
};

}  // namespace moeinf
