#include "trace/trace.h"

#include <bit>
#include <string>

#include "base/error.h"

namespace moeinf {
namespace {

// Exact for every finite half, subnormals included.
float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest << 13));
    const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

[[noreturn]] void refuse(std::string_view name, const std::string& what) {
    throw Error(ErrorCode::kInvalid, std::string(name) + ": " + what);
}

void check_size(std::string_view name, const char* tensor, size_t found, int64_t expected) {
    if (found != static_cast<size_t>(expected)) {
        refuse(name, std::string("tensor '") + tensor + "': expected " + std::to_string(expected) +
                         " values, found " + std::to_string(found));
    }
}

}  // namespace

void check_trace(const TraceView& trace, std::string_view name) {
    if (trace.tokens < 1 || trace.layers < 1 || trace.num_experts < 1 || trace.k < 1) {
        refuse(name, "expected at least 1 token, layer, expert and route, found " +
                         std::to_string(trace.tokens) + " tokens, " + std::to_string(trace.layers) +
                         " layers, " + std::to_string(trace.num_experts) + " experts, top " +
                         std::to_string(trace.k));
    }
    check_size(name, "experts", trace.experts.size(), trace.tokens * trace.layers * trace.k);
    check_size(name, "sequence", trace.sequence.size(), trace.tokens);
    check_size(name, "phase", trace.phase.size(), trace.tokens);
    if (!trace.router.empty()) {
        check_size(name, "router", trace.router.size(),
                   trace.tokens * trace.layers * trace.num_experts);
    }
    for (size_t i = 0; i < trace.experts.size(); ++i) {
        const int32_t id = trace.experts[i];
        if (id < -1 || id >= trace.num_experts) {
            const auto at = static_cast<int64_t>(i);
            refuse(name, "tensor 'experts': expected ids from -1 to " +
                             std::to_string(trace.num_experts - 1) + ", found " +
                             std::to_string(id) + " at token " +
                             std::to_string(at / (trace.layers * trace.k)) + ", layer " +
                             std::to_string(at / trace.k % trace.layers));
        }
    }
    for (size_t t = 0; t < trace.phase.size(); ++t) {
        if (trace.phase[t] > 1) {
            refuse(name, "tensor 'phase': expected 0 (prefill) or 1 (decode), found " +
                             std::to_string(trace.phase[t]) + " at token " + std::to_string(t));
        }
        if (trace.sequence[t] < (t == 0 ? 0 : trace.sequence[t - 1])) {
            refuse(name,
                   "tensor 'sequence': expected ids that start at 0 or above and never "
                   "decrease, found " +
                       std::to_string(trace.sequence[t]) + " at token " + std::to_string(t));
        }
    }
}

StepReader::StepReader(const TraceView& trace)
    : trace_(trace),
      layer_(trace.layers),
      position_(static_cast<size_t>(trace.num_experts)),
      seen_(static_cast<size_t>(trace.num_experts), -1),
      router_(trace.router.empty() ? 0 : static_cast<size_t>(trace.num_experts)) {}

bool StepReader::next(Step& step) {
    if (layer_ == trace_.layers) {
        if (end_ == trace_.tokens) return false;
        start_pass();
    }
    const LayerId layer{layer_++};
    collect_experts(layer);
    if (!router_.empty()) average_router(layer);
    step.index = index_++;
    step.layer = layer;
    step.experts = experts_;
    step.counts = counts_;
    step.router = router_;
    step.prefill = prefill_;
    step.new_sequence = new_sequence_ && number(layer) == 0;
    return true;
}

void StepReader::start_pass() {
    begin_ = end_++;
    const auto first = static_cast<size_t>(begin_);
    const int32_t sequence = trace_.sequence[first];
    prefill_ = trace_.phase[first] == 0;
    new_sequence_ = begin_ == 0 || trace_.sequence[first - 1] != sequence;
    layer_ = 0;
    while (prefill_ && end_ < trace_.tokens && trace_.phase[static_cast<size_t>(end_)] == 0 &&
           trace_.sequence[static_cast<size_t>(end_)] == sequence) {
        ++end_;
    }
}

void StepReader::collect_experts(LayerId layer) {
    experts_.clear();
    counts_.clear();
    const auto k = static_cast<size_t>(trace_.k);
    for (int64_t token = begin_; token < end_; ++token) {
        const size_t row = static_cast<size_t>(token * trace_.layers + number(layer)) * k;
        for (const int16_t id : trace_.experts.subspan(row, k)) {
            if (id < 0) continue;
            const auto expert = static_cast<size_t>(id);
            if (seen_[expert] == index_) {
                ++counts_[static_cast<size_t>(position_[expert])];
                continue;
            }
            seen_[expert] = index_;
            position_[expert] = static_cast<int32_t>(experts_.size());
            experts_.push_back(trace_.shape().id(layer, ExpertIndex{id}));
            counts_.push_back(1);
        }
    }
}

void StepReader::average_router(LayerId layer) {
    std::fill(router_.begin(), router_.end(), 0.0f);
    const auto width = static_cast<size_t>(trace_.num_experts);
    for (int64_t token = begin_; token < end_; ++token) {
        const size_t row = static_cast<size_t>(token * trace_.layers + number(layer)) * width;
        for (size_t e = 0; e < width; ++e) router_[e] += half_to_float(trace_.router[row + e]);
    }
    for (float& mean : router_) mean /= static_cast<float>(end_ - begin_);
}

}  // namespace moeinf
