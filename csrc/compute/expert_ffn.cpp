#include "compute/expert_ffn.h"

#include <algorithm>
#include <limits>
#include <string>

#include "base/error.h"
#include "base/ranges.h"
#include "base/sizes.h"
#include "compute/matrix_product.h"

namespace moeinf {
namespace {

// Routes that share one pass over a block of weight rows.
constexpr int64_t kRowsPerWalk = 64;
// A block is a multiple of this many weight rows, a multiple in turn of every tile's width.
constexpr int64_t kBlockRows = 48;
// On a matrix unit also of a panel of outputs: how a panel is decoded depends on all its scales,
// and which outputs are in it must not depend on how the work is cut.
constexpr int64_t kTiledBlockRows = 96;
// Gate values (and up values) that one task holds at a time. The matrix unit takes longer blocks.
constexpr int64_t kGateValues = kRowsPerWalk * kBlockRows;
constexpr int64_t kTiledGateValues = kRowsPerWalk * kTiledBlockRows;
// The most bytes of a block. Weights that are read once profit from long blocks, where the hardware
// prefetcher works best. Weights that are read again must stay in the L2 cache with the
// activations.
constexpr int64_t kStreamBytes = 768 << 10;
constexpr int64_t kRewalkBytes = 192 << 10;
// `down` writes its results to their final place.
constexpr int64_t kAnyValues = int64_t{1} << 40;
// A task takes this share of the work that is left, if a block is no larger. Each task begins with
// a wait for memory, so there are few.
constexpr int64_t kSharesPerThread = 2;
constexpr int64_t kMaxTopK = 64;
constexpr size_t kAlign = 64;
// Bytes of activations that one task arranges. A call for a single token stays on its thread.
constexpr int64_t kArrangeBytes = int64_t{64} << 10;

[[noreturn]] void invalid(const std::string& message) {
    throw Error(ErrorCode::kInvalid, "expert FFN: " + message);
}

// Returns the number of experts.
int32_t check(const FfnInput& input) {
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
                " experts are too many for one call");
    }
    return input.num_experts;
}

// Whether this matrix multiplies the tokens' bf16 without widening them.
bool as_it_is(const KernelSet& kernels, const FfnInput& input, const Matrix& matrix) {
    return input.hidden_dtype == DType::kBF16 &&
           product_of(kernels, matrix, DType::kBF16).dot != nullptr;
}

// A matrix unit pays where an expert has many tokens. That follows from the whole call, so that its
// parts have the same bits however many they are.
bool on_tiles(const KernelSet& kernels, const ExpertFfn& expert, const FfnInput& input) {
    const auto served = [&](const Matrix& matrix) {
        if (kernels.formats[static_cast<size_t>(matrix.format)].tiles == nullptr) return false;
        if (!matrix.scales) return true;
        const int64_t group = matrix.scales->block_cols;
        return group == kTileDepth / 2 || group % kTileDepth == 0;
    };
    return input.hidden_dtype == DType::kBF16 && served(expert.gate) &&
           (!expert.up || served(*expert.up)) && served(expert.down) &&
           Routing::is_long(std::max(input.tokens, input.whole_tokens), input.top_k,
                            input.num_experts);
}

// How a call takes its numbers.
struct Types {
    bool tiled;
    DType x;
    DType inner;
};
Types types_of(const KernelSet& kernels, const ExpertFfn& expert, const FfnInput& input) {
    const bool tiled = on_tiles(kernels, expert, input);
    const bool x_as_it_is = as_it_is(kernels, input, expert.gate) &&
                            (!expert.up || as_it_is(kernels, input, *expert.up));
    const auto type = [&](bool bf16) { return tiled || bf16 ? DType::kBF16 : DType::kF32; };
    return {tiled, type(x_as_it_is), type(as_it_is(kernels, input, expert.down))};
}

}  // namespace

ExpertFfnCall::ExpertFfnCall(CpuEngine& engine, const ExpertFfn& expert, const FfnInput& input)
    : engine_(engine),
      kernels_(engine.kernels()),
      expert_(expert),
      input_(input),
      gate_kernels_(kernels_.gates[expert.function.kernel]),
      tiled_(on_tiles(kernels_, expert, input)),
      x_dtype_(types_of(kernels_, expert, input).x),
      inner_dtype_(types_of(kernels_, expert, input).inner),
      routing_(check(input)) {
    if (input_.ids_are_int64) {
        sort_routes(static_cast<const int64_t*>(input_.topk_ids));
    } else {
        sort_routes(static_cast<const int32_t*>(input_.topk_ids));
    }
    read_topk_weights();
    computed_.assign(routing_.experts().size(), false);

    const bool widened = x_dtype_ != input_.hidden_dtype;
    const auto routes = row_token_.size();
    const auto hidden = static_cast<size_t>(expert_.hidden());
    const size_t y_bytes = round_up(routes * hidden * sizeof(float), kAlign);
    const size_t inner_bytes = round_up(
        routes * static_cast<size_t>(expert_.intermediate()) * dtype_bytes(inner_dtype_), kAlign);
    const size_t x_bytes =
        widened ? static_cast<size_t>(input_.tokens) * hidden * sizeof(float) : 0;
    size_t size = y_bytes + inner_bytes + round_up(x_bytes, kAlign);
    const auto tokens = tiled_ ? static_cast<int64_t>(routes) : input_.tokens;
    gate_x_ = reserve(expert_.gate, x_dtype_, tokens, size);
    if (tiled_) {
        up_x_ = gate_x_;
    } else if (expert_.up) {
        const size_t before = size;
        up_x_ = reserve(*expert_.up, x_dtype_, input_.tokens, size);
        if (up_x_.product->arrange == gate_x_.product->arrange) {
            up_x_.offset = gate_x_.offset;
            size = before;
        }
    }
    down_x_ = reserve(expert_.down, inner_dtype_, static_cast<int64_t>(routes), size);
    scratch_ = engine_.take_scratch(size);
    y_ = reinterpret_cast<float*>(scratch_.data());
    inner_ = scratch_.data() + y_bytes;
    x_ = static_cast<const std::byte*>(input_.hidden);
    if (widened) {
        std::byte* x = scratch_.data() + y_bytes + inner_bytes;
        kernels_.widen(input_.hidden, input_.hidden_dtype, input_.tokens * expert_.hidden(),
                       reinterpret_cast<float*>(x));
        x_ = x;
    }
    const size_t row = hidden * dtype_bytes(x_dtype_);
    for (Activations* x : {&gate_x_, &up_x_}) {
        if (x->product == nullptr || tiled_) continue;
        const auto arrange = x->product->arrange;
        x->rows = arrange == nullptr ? x_ : scratch_.data() + x->offset;
        if (arrange == nullptr || (x == &up_x_ && arrange == gate_x_.product->arrange)) continue;
        const int64_t step = std::max<int64_t>(1, kArrangeBytes / static_cast<int64_t>(row));
        engine_.pool().run((input_.tokens + step - 1) / step, [&](int64_t task) noexcept {
            const int64_t end = std::min(input_.tokens, (task + 1) * step);
            for (int64_t t = task * step; t < end; ++t) {
                arrange(x_ + static_cast<size_t>(t) * row, expert_.hidden(),
                        scratch_.data() + x->offset + static_cast<size_t>(t) * x->row_bytes);
            }
        });
    }
    down_x_.rows = down_x_.product->arrange == nullptr ? inner_ : scratch_.data() + down_x_.offset;
    if (tiled_) {
        for (Activations* one : {&gate_x_, &up_x_, &down_x_}) {
            one->rows = scratch_.data() + one->offset;
        }
    }
}

// Adds what the arranged rows need to the size of the scratch memory.
ExpertFfnCall::Activations ExpertFfnCall::reserve(const Matrix& matrix, DType dtype, int64_t rows,
                                                  size_t& size) const {
    Activations x{.product = &product_of(kernels_, matrix, dtype), .offset = size};
    const auto cols = static_cast<size_t>(matrix.cols);
    x.row_bytes = tiled_ ? static_cast<size_t>(tile_row_bytes(matrix.cols))
                         : activation_row_bytes(*x.product, cols, dtype);
    if (tiled_ || x.product->arrange != nullptr) {
        size +=
            round_up(static_cast<size_t>(rows) * x.row_bytes + (tiled_ ? kTileBehind : 0), kAlign);
    }
    return x;
}

// The activations of these experts for the matrix unit; `row_of(row)` is where those of a row lie.
template <class Row>
void ExpertFfnCall::arrange_tiles(std::span<const SlotOfExpert> ready, const Activations& x,
                                  int64_t cols, const Row& row_of) {
    std::vector<std::pair<int64_t, int64_t>> tiles;  // the first row, and how many
    for (const SlotOfExpert& expert : ready) {
        const auto p = static_cast<size_t>(expert.position);
        for (int64_t row = begin_[p]; row < begin_[p + 1]; row += kTileRows) {
            tiles.emplace_back(row, std::min<int64_t>(kTileRows, begin_[p + 1] - row));
        }
    }
    engine_.pool().run(static_cast<int64_t>(tiles.size()), [&](int64_t index) noexcept {
        const auto [first, count] = tiles[static_cast<size_t>(index)];
        const void* from[kTileRows];
        for (int64_t r = 0; r < count; ++r) from[r] = row_of(first + r);
        kernels_.arrange_tiles(
            from, count, cols,
            scratch_.data() + x.offset + static_cast<size_t>(first) * x.row_bytes);
    });
}

// The gate function's values of these experts, for the product with down.
void ExpertFfnCall::arrange_inner(std::span<const SlotOfExpert> ready) {
    if (tiled_) {
        return arrange_tiles(ready, down_x_, expert_.intermediate(), [&](int64_t row) {
            return inner_ + static_cast<size_t>(row * expert_.intermediate()) * sizeof(BF16);
        });
    }
    if (down_x_.product->arrange == nullptr) return;
    const size_t row = static_cast<size_t>(expert_.intermediate()) * dtype_bytes(inner_dtype_);
    size_t bytes = 0;
    for (const SlotOfExpert& expert : ready) {
        bytes += row * static_cast<size_t>(routing_.counts()[static_cast<size_t>(expert.position)]);
    }
    const auto arrange = [&](int64_t index) noexcept {
        const auto p = static_cast<size_t>(ready[static_cast<size_t>(index)].position);
        for (int64_t at = begin_[p]; at < begin_[p + 1]; ++at) {
            down_x_.product->arrange(
                inner_ + static_cast<size_t>(at) * row, expert_.intermediate(),
                scratch_.data() + down_x_.offset + static_cast<size_t>(at) * down_x_.row_bytes);
        }
    };
    const auto experts = static_cast<int64_t>(ready.size());
    if (bytes > kArrangeBytes) {
        engine_.pool().run(experts, arrange);
    } else {
        for (int64_t i = 0; i < experts; ++i) arrange(i);
    }
}

ExpertFfnCall::~ExpertFfnCall() {
    engine_.give_scratch(std::move(scratch_));
}

template <class Id>
void ExpertFfnCall::sort_routes(const Id* ids) {
    routing_.read(ids, input_.tokens, input_.top_k);
    const std::span<const int32_t> counts = routing_.counts();
    begin_.assign(counts.size() + 1, 0);
    for (size_t p = 0; p < counts.size(); ++p) begin_[p + 1] = begin_[p] + counts[p];
    std::vector<int32_t> next(begin_.begin(), begin_.end() - 1);
    const int64_t routes = input_.tokens * input_.top_k;
    row_token_.resize(static_cast<size_t>(begin_.back()));
    row_of_route_.assign(static_cast<size_t>(routes), -1);
    for (int64_t i = 0; i < routes; ++i) {
        const int32_t at = routing_.position_of(ids[i]);
        if (at < 0) continue;
        const int32_t row = next[static_cast<size_t>(at)]++;
        row_token_[static_cast<size_t>(row)] = static_cast<int32_t>(i / input_.top_k);
        row_of_route_[static_cast<size_t>(i)] = row;
    }
}

std::span<const float> ExpertFfnCall::recent(int64_t sequences) {
    const auto of = [&](const auto* ids) {
        return routing_.recent(ids, input_.tokens, input_.top_k, sequences);
    };
    return input_.ids_are_int64 ? of(static_cast<const int64_t*>(input_.topk_ids))
                                : of(static_cast<const int32_t*>(input_.topk_ids));
}

void ExpertFfnCall::read_topk_weights() {
    topk_weights_.resize(row_of_route_.size());
    kernels_.widen(input_.topk_weights, input_.topk_weights_dtype,
                   static_cast<int64_t>(topk_weights_.size()), topk_weights_.data());
}

void ExpertFfnCall::compute(std::span<const SlotOfExpert> ready) {
    const Range range("moeinf compute");
    for (const SlotOfExpert& expert : ready) {
        const auto p = static_cast<size_t>(expert.position);
        if (expert.position < 0 || p >= routing_.experts().size()) {
            invalid("position " + std::to_string(expert.position) + " of " +
                    std::to_string(routing_.experts().size()) + " experts");
        }
        if (computed_[p]) {
            invalid("expert " + std::to_string(number(routing_.experts()[p])) +
                    " was computed before");
        }
        computed_[p] = true;
    }
    if (tiled_) {
        arrange_tiles(ready, gate_x_, expert_.hidden(), [&](int64_t row) {
            const auto token = static_cast<int64_t>(row_token_[static_cast<size_t>(row)]);
            return x_ + static_cast<size_t>(token * expert_.hidden()) * sizeof(BF16);
        });
    }
    const int64_t up_bytes = expert_.up ? row_bytes(*expert_.up) : 0;
    run_blocks(ready, expert_.intermediate(), std::max(row_bytes(expert_.gate), up_bytes),
               tiled_ ? kTiledGateValues : kGateValues,
               [this](const SlotOfExpert& expert, int64_t first, int64_t rows) noexcept {
                   gate_up(expert, first, rows);
               });
    arrange_inner(ready);
    run_blocks(ready, expert_.hidden(), row_bytes(expert_.down), kAnyValues,
               [this](const SlotOfExpert& expert, int64_t first, int64_t rows) noexcept {
                   down(expert, first, rows);
               });
}

// Cuts the `rows` weight rows of each expert into blocks, and calls block(expert, first, count) for
// each. Blocks become smaller towards the end of the work, so no thread waits long for the last
// one.
template <class Block>
void ExpertFfnCall::run_blocks(std::span<const SlotOfExpert> ready, int64_t rows, int64_t row_bytes,
                               int64_t most_values, const Block& block) {
    struct Task {
        const SlotOfExpert* expert;
        int64_t first;
        int64_t count;
    };
    std::vector<Task> tasks;
    const int64_t unit = tiled_ ? kTiledBlockRows : kBlockRows;
    int64_t left = static_cast<int64_t>(ready.size()) * rows;
    for (const SlotOfExpert& expert : ready) {
        const int64_t routes = routing_.counts()[static_cast<size_t>(expert.position)];
        const int64_t most_bytes = tiled_ || routes <= kRowsPerWalk ? kStreamBytes : kRewalkBytes;
        const int64_t most =
            std::min(most_bytes / row_bytes, most_values / std::min(routes, kRowsPerWalk));
        for (int64_t first = 0, count = 0; first < rows; first += count, left -= count) {
            const int64_t share = left / (kSharesPerThread * engine_.pool().threads());
            const int64_t units = std::min(share, most) / unit;
            count = std::min(std::max<int64_t>(1, units) * unit, rows - first);
            tasks.push_back({&expert, first, count});
        }
    }
    engine_.pool().run(static_cast<int64_t>(tasks.size()), [&](int64_t index) noexcept {
        const Task& task = tasks[static_cast<size_t>(index)];
        block(*task.expert, task.first, task.count);
    });
}

// `count` rows of inner, from row `first` of gate and of up.
void ExpertFfnCall::gate_up(const SlotOfExpert& expert, int64_t first,
                            int64_t count) const noexcept {
    const auto p = static_cast<size_t>(expert.position);
    const bool to_bf16 = inner_dtype_ == DType::kBF16;
    float gate[kTiledGateValues];
    float up[kTiledGateValues];
    const int64_t step = tiled_ ? kTileRows : 1;
    for (int64_t row = begin_[p]; row < begin_[p + 1]; row += kRowsPerWalk) {
        const int64_t rows = std::min<int64_t>(kRowsPerWalk, begin_[p + 1] - row);
        const auto product = [&](const Matrix& matrix, const Activations& x, float* y) {
            const void* pointers[kRowsPerWalk];
            for (int64_t r = 0; r < rows; r += step) {
                const int64_t at = tiled_ ? row + r : row_token_[static_cast<size_t>(row + r)];
                pointers[r / step] = x.row(at);
            }
            DotJob job{.x = pointers,
                       .rows = rows,
                       .outputs = count,
                       .depth = expert_.hidden(),
                       .y = y,
                       .y_stride = count,
                       .from_memory = row == begin_[p]};
            multiply(kernels_, matrix, dot_of(matrix, x), job, expert.slot, first);
        };
        product(expert_.gate, gate_x_, gate);
        if (expert_.up) product(*expert_.up, up_x_, up);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t at = (row + r) * expert_.intermediate() + first;
            (to_bf16 ? gate_kernels_.to_bf16 : gate_kernels_.to_f32)(
                {gate + r * count, up + r * count, count,
                 inner_ + static_cast<size_t>(at) * dtype_bytes(inner_dtype_), expert_.function});
        }
    }
}

// `count` columns of y, from row `first` of down.
void ExpertFfnCall::down(const SlotOfExpert& expert, int64_t first, int64_t count) const noexcept {
    const auto p = static_cast<size_t>(expert.position);
    const void* x[kRowsPerWalk];
    const int64_t step = tiled_ ? kTileRows : 1;
    for (int64_t row = begin_[p]; row < begin_[p + 1]; row += kRowsPerWalk) {
        const int64_t rows = std::min<int64_t>(kRowsPerWalk, begin_[p + 1] - row);
        for (int64_t r = 0; r < rows; r += step) x[r / step] = down_x_.row(row + r);
        DotJob job{.x = x,
                   .rows = rows,
                   .outputs = count,
                   .depth = expert_.intermediate(),
                   .y = y_ + row * expert_.hidden() + first,
                   .y_stride = expert_.hidden(),
                   .from_memory = row == begin_[p]};
        multiply(kernels_, expert_.down, dot_of(expert_.down, down_x_), job, expert.slot, first);
    }
}

void ExpertFfnCall::finish(void* out, DType out_dtype) {
    for (size_t p = 0; p < computed_.size(); ++p) {
        if (!computed_[p]) {
            invalid("finish() before expert " + std::to_string(number(routing_.experts()[p])) +
                    " was computed");
        }
    }
    // One task sums about 64 KB, so a call for a single token stays on its thread.
    const int64_t row_bytes = std::max<int64_t>(1, input_.top_k * expert_.hidden() * 4);
    const int64_t step = std::max<int64_t>(1, (int64_t{64} << 10) / row_bytes);
    const size_t out_row = static_cast<size_t>(expert_.hidden()) * dtype_bytes(out_dtype);
    engine_.pool().run((input_.tokens + step - 1) / step, [&](int64_t task) noexcept {
        const float* y[kMaxTopK];
        float scale[kMaxTopK];
        const int64_t end = std::min(input_.tokens, (task + 1) * step);
        for (int64_t t = task * step; t < end; ++t) {
            int64_t terms = 0;
            for (int64_t i = t * input_.top_k; i < (t + 1) * input_.top_k; ++i) {
                const int32_t row = row_of_route_[static_cast<size_t>(i)];
                if (row < 0) continue;
                y[terms] = y_ + row * expert_.hidden();
                scale[terms++] = topk_weights_[static_cast<size_t>(i)];
            }
            kernels_.combine({y, scale, terms, expert_.hidden(),
                              static_cast<std::byte*>(out) + static_cast<size_t>(t) * out_row,
                              out_dtype});
        }
    });
}

int64_t ExpertFfnCall::tokens_per_call(const KernelSet& kernels, const ExpertFfn& expert,
                                       const FfnInput& input, size_t scratch_bytes) {
    constexpr size_t kGaps = 8 * kAlign;  // between the parts, and behind tiles
    const auto [tiled, x, inner] = types_of(kernels, expert, input);
    const auto arranged = [&, tiled = tiled](const Matrix& matrix, DType dtype) {
        if (tiled) return static_cast<size_t>(tile_row_bytes(matrix.cols));
        const Product& product = product_of(kernels, matrix, dtype);
        if (product.arrange == nullptr) return size_t{0};
        return activation_row_bytes(product, static_cast<size_t>(matrix.cols), dtype);
    };
    const auto hidden = static_cast<size_t>(expert.hidden());
    size_t route = hidden * sizeof(float) +
                   static_cast<size_t>(expert.intermediate()) * dtype_bytes(inner) +
                   arranged(expert.down, inner);
    size_t token = x == input.hidden_dtype ? 0 : hidden * sizeof(float);
    (tiled ? route : token) += arranged(expert.gate, x);
    if (!tiled && expert.up &&
        product_of(kernels, *expert.up, x).arrange != product_of(kernels, expert.gate, x).arrange) {
        token += arranged(*expert.up, x);
    }
    token += route * static_cast<size_t>(std::max<int64_t>(1, input.top_k));
    const size_t room = scratch_bytes - std::min(scratch_bytes, kGaps);
    return std::max<int64_t>(1, static_cast<int64_t>(room / token));
}

}  // namespace moeinf
