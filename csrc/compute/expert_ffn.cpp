#include "compute/expert_ffn.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "base/error.h"
#include "base/sizes.h"

namespace moeinf {
namespace {

// Routes that share one walk over a block of weight rows.
constexpr int64_t kRowsPerWalk = 64;
// A block is a multiple of this many weight rows, a multiple in turn of every tile's width.
constexpr int64_t kBlockRows = 48;
// Gate values (and up values) that one task holds at a time.
constexpr int64_t kGateValues = kRowsPerWalk * kBlockRows;
// The most bytes of a block: where weights are walked once, long blocks let prefetching reach its
// stride; where they are walked again, the block must stay in the L2 cache with the activations.
constexpr int64_t kStreamBytes = 768 << 10;
constexpr int64_t kRewalkBytes = 192 << 10;
// `down` writes its results where they stay.
constexpr int64_t kAnyValues = int64_t{1} << 40;
// How finely the rest of the work is cut.
constexpr int64_t kSharesPerThread = 4;
constexpr int64_t kMaxTopK = 64;
constexpr size_t kAlign = 64;

size_t scratch_per_route(const FfnShape& shape) {
    return static_cast<size_t>(shape.hidden + shape.intermediate) * sizeof(float);
}

[[noreturn]] void invalid(const std::string& message) {
    throw Error(ErrorCode::kInvalid, "expert FFN: " + message);
}

void check(const FfnShape& shape, const FfnInput& input) {
    if (shape.hidden <= 0 || shape.intermediate <= 0) {
        invalid("hidden and intermediate sizes must be positive, got " +
                std::to_string(shape.hidden) + " and " + std::to_string(shape.intermediate));
    }
    const size_t unit = dtype_bytes(shape.weights);
    if (shape.gate_up_offset % unit != 0 || shape.down_offset % unit != 0) {
        invalid("segment offsets must be multiples of " + std::to_string(unit) + " bytes, got " +
                std::to_string(shape.gate_up_offset) + " and " + std::to_string(shape.down_offset));
    }
    if (input.tokens < 0 || input.top_k < 0 || input.num_experts < 0) {
        invalid("tokens, top_k and num_experts must not be negative");
    }
    if (input.top_k > kMaxTopK) {
        invalid("top_k may be at most " + std::to_string(kMaxTopK) + ", got " +
                std::to_string(input.top_k));
    }
    const int64_t most = std::numeric_limits<int32_t>::max();
    if (input.top_k > 0 && input.tokens > most / input.top_k) {
        invalid(std::to_string(input.tokens) + " tokens of " + std::to_string(input.top_k) +
                " experts are too many for one pass");
    }
}

std::string place(int64_t route, int64_t top_k) {
    return "token " + std::to_string(route / top_k) + ", position " + std::to_string(route % top_k);
}

}  // namespace

FfnPass::FfnPass(CpuEngine& engine, const FfnShape& shape, const FfnInput& input)
    : engine_(engine),
      kernels_(engine.kernels()),
      shape_(shape),
      input_(input),
      act_dtype_(engine.kernels().activation_dtype(input.hidden_dtype, shape.weights)) {
    check(shape_, input_);
    if (input_.ids_are_int64) {
        sort_routes(static_cast<const int64_t*>(input_.topk_ids));
    } else {
        sort_routes(static_cast<const int32_t*>(input_.topk_ids));
    }
    read_topk_weights();
    computed_.assign(experts_.size(), false);

    const bool widened = act_dtype_ != input_.hidden_dtype;
    const auto routes = row_token_.size();
    const auto hidden = static_cast<size_t>(shape_.hidden);
    const size_t y_bytes = round_up(routes * hidden * sizeof(float), kAlign);
    const size_t inner_bytes = round_up(
        routes * static_cast<size_t>(shape_.intermediate) * dtype_bytes(act_dtype_), kAlign);
    const size_t x_bytes =
        widened ? static_cast<size_t>(input_.tokens) * hidden * sizeof(float) : 0;
    scratch_ = engine_.take_scratch(y_bytes + inner_bytes + x_bytes);
    y_ = reinterpret_cast<float*>(scratch_.data());
    inner_ = scratch_.data() + y_bytes;
    x_ = static_cast<const std::byte*>(input_.hidden);
    if (widened) {
        std::byte* x = scratch_.data() + y_bytes + inner_bytes;
        kernels_.widen(input_.hidden, input_.hidden_dtype, input_.tokens * shape_.hidden,
                       reinterpret_cast<float*>(x));
        x_ = x;
    }
}

FfnPass::~FfnPass() {
    engine_.give_scratch(std::move(scratch_));
}

template <class Id>
void FfnPass::sort_routes(const Id* ids) {
    const int64_t routes = input_.tokens * input_.top_k;
    std::vector<int32_t> position(static_cast<size_t>(input_.num_experts), -1);
    for (int64_t i = 0; i < routes; ++i) {
        const Id id = ids[i];
        if (id == -1) continue;
        if (id < 0 || id >= input_.num_experts) {
            invalid("expert id " + std::to_string(id) + " at " + place(i, input_.top_k) +
                    " is outside [-1, " + std::to_string(input_.num_experts) + ")");
        }
        int32_t& at = position[static_cast<size_t>(id)];
        if (at < 0) {
            at = static_cast<int32_t>(experts_.size());
            experts_.push_back(ExpertIndex(id));
            counts_.push_back(0);
        }
        ++counts_[static_cast<size_t>(at)];
    }
    begin_.assign(experts_.size() + 1, 0);
    for (size_t p = 0; p < experts_.size(); ++p) begin_[p + 1] = begin_[p] + counts_[p];
    std::vector<int32_t> next(begin_.begin(), begin_.end() - 1);
    row_token_.resize(static_cast<size_t>(begin_.back()));
    row_of_route_.assign(static_cast<size_t>(routes), -1);
    for (int64_t i = 0; i < routes; ++i) {
        if (ids[i] == -1) continue;
        const int32_t at = position[static_cast<size_t>(ids[i])];
        const int32_t row = next[static_cast<size_t>(at)]++;
        row_token_[static_cast<size_t>(row)] = static_cast<int32_t>(i / input_.top_k);
        row_of_route_[static_cast<size_t>(i)] = row;
    }
}

void FfnPass::read_topk_weights() {
    topk_weights_.resize(row_of_route_.size());
    kernels_.widen(input_.topk_weights, input_.topk_weights_dtype,
                   static_cast<int64_t>(topk_weights_.size()), topk_weights_.data());
    for (size_t i = 0; i < topk_weights_.size(); ++i) {
        if (row_of_route_[i] >= 0 && !std::isfinite(topk_weights_[i])) {
            invalid("router weight " + std::to_string(topk_weights_[i]) + " at " +
                    place(static_cast<int64_t>(i), input_.top_k) + " is not finite");
        }
    }
}

const std::byte* FfnPass::activation_row(int64_t token) const {
    return x_ + static_cast<size_t>(token * shape_.hidden) * dtype_bytes(act_dtype_);
}

void FfnPass::compute(std::span<const SlotOfExpert> ready) {
    for (const SlotOfExpert& expert : ready) {
        const auto p = static_cast<size_t>(expert.position);
        if (expert.position < 0 || p >= experts_.size()) {
            invalid("position " + std::to_string(expert.position) + " of " +
                    std::to_string(experts_.size()) + " experts");
        }
        if (computed_[p]) {
            invalid("expert " + std::to_string(number(experts_[p])) + " was computed before");
        }
        computed_[p] = true;
    }
    const auto size = static_cast<int64_t>(dtype_bytes(shape_.weights));
    run_blocks(ready, shape_.intermediate, shape_.hidden * size, kGateValues,
               [this](const SlotOfExpert& expert, int64_t first, int64_t rows) noexcept {
                   gate_up(expert, first, rows);
               });
    run_blocks(ready, shape_.hidden, shape_.intermediate * size, kAnyValues,
               [this](const SlotOfExpert& expert, int64_t first, int64_t rows) noexcept {
                   down(expert, first, rows);
               });
}

// Cuts the `rows` weight rows of each expert into blocks, and calls block(expert, first, count) for
// each. Blocks shrink towards the end of the work, so that no thread waits long for the last one.
template <class Block>
void FfnPass::run_blocks(std::span<const SlotOfExpert> ready, int64_t rows, int64_t row_bytes,
                         int64_t most_values, const Block& block) {
    struct Task {
        const SlotOfExpert* expert;
        int64_t first;
        int64_t count;
    };
    std::vector<Task> tasks;
    int64_t left = static_cast<int64_t>(ready.size()) * rows;
    for (const SlotOfExpert& expert : ready) {
        const int64_t routes = counts_[static_cast<size_t>(expert.position)];
        const int64_t most_bytes = routes <= kRowsPerWalk ? kStreamBytes : kRewalkBytes;
        const int64_t most =
            std::min(most_bytes / row_bytes, most_values / std::min(routes, kRowsPerWalk));
        for (int64_t first = 0, count = 0; first < rows; first += count, left -= count) {
            const int64_t share = left / (kSharesPerThread * engine_.pool().threads());
            const int64_t units = std::min(share, most) / kBlockRows;
            count = std::min(std::max<int64_t>(1, units) * kBlockRows, rows - first);
            tasks.push_back({&expert, first, count});
        }
    }
    engine_.pool().run(static_cast<int64_t>(tasks.size()), [&](int64_t index) noexcept {
        const Task& task = tasks[static_cast<size_t>(index)];
        block(*task.expert, task.first, task.count);
    });
}

// `count` rows of inner, from row `first` of gate and of up.
void FfnPass::gate_up(const SlotOfExpert& expert, int64_t first, int64_t count) const noexcept {
    const auto p = static_cast<size_t>(expert.position);
    const auto weight_row = static_cast<size_t>(shape_.hidden) * dtype_bytes(shape_.weights);
    const std::byte* weights = expert.slot + shape_.gate_up_offset;
    const std::byte* gate_rows = weights + static_cast<size_t>(first) * weight_row;
    const std::byte* up_rows = gate_rows + static_cast<size_t>(shape_.intermediate) * weight_row;
    float gate[kGateValues];
    float up[kGateValues];
    const void* x[kRowsPerWalk];
    for (int64_t row = begin_[p]; row < begin_[p + 1]; row += kRowsPerWalk) {
        const int64_t rows = std::min<int64_t>(kRowsPerWalk, begin_[p + 1] - row);
        for (int64_t r = 0; r < rows; ++r) {
            x[r] = activation_row(row_token_[static_cast<size_t>(row + r)]);
        }
        DotJob job{x, rows, gate_rows, count, shape_.hidden, gate, count, row == begin_[p]};
        kernels_.dot(act_dtype_, shape_.weights, job);
        if (shape_.gated) {
            job.w = up_rows;
            job.y = up;
            kernels_.dot(act_dtype_, shape_.weights, job);
        }
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t at = (row + r) * shape_.intermediate + first;
            kernels_.activate(
                shape_.activation, gate + r * count, shape_.gated ? up + r * count : nullptr, count,
                inner_ + static_cast<size_t>(at) * dtype_bytes(act_dtype_), act_dtype_);
        }
    }
}

// `count` columns of y, from row `first` of down.
void FfnPass::down(const SlotOfExpert& expert, int64_t first, int64_t count) const noexcept {
    const auto p = static_cast<size_t>(expert.position);
    const auto weight_row = static_cast<size_t>(shape_.intermediate) * dtype_bytes(shape_.weights);
    const auto inner_row = static_cast<size_t>(shape_.intermediate) * dtype_bytes(act_dtype_);
    const std::byte* weights =
        expert.slot + shape_.down_offset + static_cast<size_t>(first) * weight_row;
    const void* x[kRowsPerWalk];
    for (int64_t row = begin_[p]; row < begin_[p + 1]; row += kRowsPerWalk) {
        const int64_t rows = std::min<int64_t>(kRowsPerWalk, begin_[p + 1] - row);
        for (int64_t r = 0; r < rows; ++r) x[r] = inner_ + static_cast<size_t>(row + r) * inner_row;
        kernels_.dot(act_dtype_, shape_.weights,
                     DotJob{x, rows, weights, count, shape_.intermediate,
                            y_ + row * shape_.hidden + first, shape_.hidden, row == begin_[p]});
    }
}

void FfnPass::finish(void* out, DType out_dtype) {
    for (size_t p = 0; p < computed_.size(); ++p) {
        if (!computed_[p]) {
            invalid("finish() before expert " + std::to_string(number(experts_[p])) +
                    " was computed");
        }
    }
    // One task sums about 64 KB, so that the call for a single token stays on its own thread.
    const int64_t row_bytes = std::max<int64_t>(1, input_.top_k * shape_.hidden * 4);
    const int64_t step = std::max<int64_t>(1, (int64_t{64} << 10) / row_bytes);
    const size_t out_row = static_cast<size_t>(shape_.hidden) * dtype_bytes(out_dtype);
    engine_.pool().run((input_.tokens + step - 1) / step, [&](int64_t task) noexcept {
        const float* y[kMaxTopK];
        float scale[kMaxTopK];
        const int64_t end = std::min(input_.tokens, (task + 1) * step);
        for (int64_t t = task * step; t < end; ++t) {
            int64_t terms = 0;
            for (int64_t i = t * input_.top_k; i < (t + 1) * input_.top_k; ++i) {
                const int32_t row = row_of_route_[static_cast<size_t>(i)];
                if (row < 0) continue;
                y[terms] = y_ + row * shape_.hidden;
                scale[terms++] = topk_weights_[static_cast<size_t>(i)];
            }
            kernels_.combine({y, scale, terms, shape_.hidden,
                              static_cast<std::byte*>(out) + static_cast<size_t>(t) * out_row,
                              out_dtype});
        }
    });
}

int64_t FfnPass::tokens_per_pass(const FfnShape& shape, int64_t top_k, size_t scratch_bytes) {
    const size_t token =
        scratch_per_route(shape) * static_cast<size_t>(std::max<int64_t>(1, top_k));
    return std::max<int64_t>(1, static_cast<int64_t>(scratch_bytes / token));
}

}  // namespace moeinf
