// The recorded routing of real runs as a view, and its steps. The simulator and Belady read traces
// through this view. It owns no memory, reads no files and changes no value.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "policy/policy.h"

namespace moeinf {

// Borrowed arrays, row-major, in the shapes of the trace file.
struct TraceView {
    int64_t tokens = 0;
    int32_t layers = 0;       // MoE layers
    int32_t num_experts = 0;  // per layer
    int32_t k = 0;
    std::span<const int16_t> experts;   // [tokens, layers, k], -1: none
    std::span<const int32_t> sequence;  // [tokens], never decreasing
    std::span<const uint8_t> phase;     // [tokens], 0 prefill, 1 decode
    std::span<const uint16_t> router;   // [tokens, layers, num_experts] float16 bits, or empty

    [[nodiscard]] ModelShape shape() const noexcept { return {layers, num_experts}; }
};

// Throws Error(kInvalid), naming `name`, the tensor, what was expected and what was found.
void check_trace(const TraceView& trace, std::string_view name);

// Yields the steps in order. Consecutive prefill tokens of one sequence are one pass, and every
// decode token is one pass. A pass has one step per layer. The experts of a step are distinct, in
// routing order, token by token.
class StepReader {
public:
    explicit StepReader(const TraceView& trace);

    // False after the last step. The step's spans hold until the next call.
    bool next(Step& step);

    // Tokens of the pass that the latest step belongs to.
    [[nodiscard]] int64_t first_token() const noexcept { return begin_; }
    [[nodiscard]] int64_t end_token() const noexcept { return end_; }
    [[nodiscard]] bool pass_complete() const noexcept { return layer_ == trace_.layers; }

private:
    void start_pass();
    void collect_experts(LayerId layer);
    void average_router(LayerId layer);

    TraceView trace_;
    int64_t begin_ = 0, end_ = 0;  // tokens of the current pass
    int32_t layer_;                // next to be read
    int64_t index_ = 0;            // steps yielded
    bool prefill_ = false, new_sequence_ = false;
    std::vector<ExpertId> experts_;
    std::vector<int32_t> counts_;
    std::vector<int32_t> position_;  // by in-layer expert: its position in experts_
    std::vector<int64_t> seen_;      // by in-layer expert: the last step that used it
    std::vector<float> router_;
};

}  // namespace moeinf
