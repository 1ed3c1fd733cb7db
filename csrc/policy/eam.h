// Expert activation matrices, the memory of the policy that this project is named after
// (MoE-Infinity, arXiv 2401.14361v3, section 4): a collection of the activations of whole requests,
// and the match of the pass in progress against it. Knows no slots. One thread at a time.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "policy/policy.h"

namespace moeinf {

// EAMC: up to `capacity` matrices [layers, experts] of finished requests (rEAM), of one phase.
// When it is full a new matrix replaces the entry nearest to it by cosine distance (section 4.2).
class EamCollection {
public:
    // Throws Error(kInvalid) unless capacity >= 1.
    EamCollection(ModelShape shape, int32_t capacity);

    // `matrix` is row-major and holds counts. Throws Error(kInvalid) if its size is wrong, a value
    // is negative or not finite, or all are zero.
    void add(std::span<const float> matrix);

    [[nodiscard]] ModelShape shape() const noexcept { return shape_; }
    [[nodiscard]] int32_t size() const noexcept { return size_; }
    [[nodiscard]] int32_t capacity() const noexcept { return capacity_; }
    [[nodiscard]] std::span<const float> entry(int32_t index) const noexcept;

    // Values of one expert in all entries, and the squares of all entries' rows [0, layer] summed.
    [[nodiscard]] std::span<const float> column(ExpertId expert) const noexcept;
    [[nodiscard]] std::span<const float> squares_through(LayerId layer) const noexcept;

private:
    ModelShape shape_;
    int32_t capacity_;
    int32_t size_ = 0;
    std::vector<float> entries_;  // [capacity, experts of all layers]: a prediction reads by entry
    std::vector<float> columns_;  // the same transposed: a match reads by column
    std::vector<float> squares_;  // [layers, capacity]
};

// The activations of finished requests, prefill and decode apart: a whole EAMC.
struct Eamc final : Collection {
    EamCollection prefill, decode;

    // Empty, with room for the paper's number of entries.
    static constexpr int32_t kPaperCapacity = 120;
    explicit Eamc(ModelShape shape)
        : prefill(shape, kPaperCapacity), decode(shape, kPaperCapacity) {}
    Eamc(EamCollection of_prefill, EamCollection of_decode)
        : prefill(std::move(of_prefill)), decode(std::move(of_decode)) {}
};

// Throws Error(kInvalid) and names both shapes unless both collections have this shape. `owner` is
// the name of the object with the shape.
void check_shape(const Eamc& eamc, ModelShape expected, std::string_view owner);

// Matches a matrix that grows by one row at a time against a collection. The scalar products are
// updated with each row, so a row of k experts costs k additions per entry.
class EamMatch {
public:
    explicit EamMatch(const EamCollection& collection);

    // Forgets all rows.
    void restart();

    // Adds the row of `layer` (flat ids and their counts); rows come in rising order.
    void add_row(LayerId layer, std::span<const ExpertId> experts, std::span<const int32_t> counts);

    // The `count` nearest entries by cosine distance over the rows so far, nearest first, ties by
    // index. An entry that is zero there is never near.
    void nearest(int32_t count, std::vector<int32_t>& out);

private:
    const EamCollection& collection_;
    LayerId layer_ = LayerId::kNone;
    std::vector<float> products_, similarities_;  // by entry
};

// Scales every row to sum 1; a row of zeros becomes uniform.
void normalise_rows(ModelShape shape, std::span<float> matrix);

// The sum of the matched entries with normalised rows: the experts of the most similar requests.
void predict_activations(const EamCollection& collection, std::span<const int32_t> matched,
                         std::span<float> out);

}  // namespace moeinf
