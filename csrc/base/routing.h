// The distinct experts that a router's ids name, and how many routes go to each.
//
// One rule for every device: -1 and `num_experts` mean "no expert" (the second is what transformers
// writes for a token that another device serves). Every other id outside [0, num_experts) is an
// error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/ids.h"

namespace moeinf {

class Routing {
public:
    explicit Routing(int32_t num_experts)
        : num_experts_(num_experts), position_(static_cast<size_t>(num_experts) + 2, -1) {}

    // Reads ids [tokens, top_k] and forgets those read before. Throws Error(kInvalid) that names
    // token, position and id; then no expert is named.
    template <class Id>
    void read(const Id* ids, int64_t tokens, int64_t top_k) {
        forget();
        const int64_t routes = tokens * top_k;
        for (int64_t i = 0; i < routes; ++i) {
            const Id id = ids[i];
            if (id < 0 || id >= num_experts_) {
                if (id == -1) continue;
                if (id != num_experts_) refuse(id, i / top_k, i % top_k);
                names_past_the_end_ = true;
                continue;
            }
            int32_t& at = position_[static_cast<size_t>(id) + 1];
            if (at < 0) {
                at = static_cast<int32_t>(experts_.size());
                experts_.push_back(ExpertIndex(id));
                counts_.push_back(0);
            }
            ++counts_[static_cast<size_t>(at)];
        }
    }

    // Ids within the layer, in order of first appearance; and the routes to each.
    [[nodiscard]] std::span<const ExpertIndex> experts() const noexcept { return experts_; }
    [[nodiscard]] std::span<const int32_t> counts() const noexcept { return counts_; }

    // True where the routes are so many that nearly every expert is among them, and that most of
    // them say little about the tokens to come.
    [[nodiscard]] static bool is_long(int64_t tokens, int64_t top_k, int64_t experts) noexcept {
        return tokens * top_k >= kLong * experts;
    }

    // How much the latest tokens use each of experts(), of the ids that were read. A token weighs
    // half as much as the one kHalfLife after it. `sequences` of equal length follow each other.
    template <class Id>
    std::span<const float> recent(const Id* ids, int64_t tokens, int64_t top_k, int64_t sequences) {
        recent_.assign(experts_.size(), 0.0f);
        const int64_t length = tokens / sequences;
        for (int64_t end = length; end <= tokens; end += length) {
            for (int64_t t = std::max(end - length, end - 8 * kHalfLife); t < end; ++t) {
                const float weight = std::exp2(-static_cast<float>(end - t) / kHalfLife);
                for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) {
                    const int32_t at = position_of(ids[i]);
                    if (at >= 0) recent_[static_cast<size_t>(at)] += weight;
                }
            }
        }
        return recent_;
    }

    // Where experts() has an id that was read; -1: it means no expert.
    [[nodiscard]] int32_t position_of(int64_t id) const noexcept {
        return position_[static_cast<size_t>(id + 1)];
    }

    // Was `num_experts` among the ids?
    [[nodiscard]] bool names_past_the_end() const noexcept { return names_past_the_end_; }

private:
    static constexpr int64_t kLong = 8;  // routes for each expert
    static constexpr int64_t kHalfLife = 32;

    void forget() noexcept {
        for (const ExpertIndex expert : experts_) position_[index(expert) + 1] = -1;
        experts_.clear();
        counts_.clear();
        names_past_the_end_ = false;
    }

    [[noreturn]] void refuse(int64_t id, int64_t token, int64_t position) {
        forget();
        throw Error(ErrorCode::kInvalid,
                    "router ids: expected -1 to " + std::to_string(num_experts_) + ", found " +
                        std::to_string(id) + " at token " + std::to_string(token) + ", position " +
                        std::to_string(position));
    }

    int64_t num_experts_;
    bool names_past_the_end_ = false;
    std::vector<ExpertIndex> experts_;
    std::vector<int32_t> counts_;
    std::vector<float> recent_;
    std::vector<int32_t> position_;  // by id + 1, from -1 to num_experts
};

}  // namespace moeinf
