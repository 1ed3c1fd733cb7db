#include "policy/eam.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "base/error.h"

namespace moeinf {
namespace {

size_t extent(int32_t count) {
    return static_cast<size_t>(count);
}

}  // namespace

EamCollection::EamCollection(ModelShape shape, int32_t capacity)
    : shape_(shape), capacity_(capacity) {
    if (capacity < 1) {
        throw Error(ErrorCode::kInvalid,
                    "a collection needs room for 1 matrix, not " + std::to_string(capacity));
    }
    entries_.resize(extent(shape.total()) * extent(capacity));
    columns_.resize(entries_.size());
    squares_.resize(extent(shape.num_layers) * extent(capacity));
}

std::span<const float> EamCollection::column(ExpertId expert) const noexcept {
    return {columns_.data() + index(expert) * extent(capacity_), extent(size_)};
}

std::span<const float> EamCollection::squares_through(LayerId layer) const noexcept {
    return {squares_.data() + index(layer) * extent(capacity_), extent(size_)};
}

std::span<const float> EamCollection::entry(int32_t index) const noexcept {
    const size_t width = extent(shape_.total());
    return {entries_.data() + extent(index) * width, width};
}

void EamCollection::add(std::span<const float> matrix) {
    if (matrix.size() != extent(shape_.total())) {
        throw Error(ErrorCode::kInvalid, "activation matrix: expected " +
                                             std::to_string(shape_.total()) + " values, found " +
                                             std::to_string(matrix.size()));
    }
    bool any = false;
    for (const float value : matrix) {
        if (!std::isfinite(value) || value < 0.0f) {
            throw Error(ErrorCode::kInvalid,
                        "activation matrix: expected counts, found " + std::to_string(value));
        }
        any |= value > 0.0f;
    }
    if (!any) throw Error(ErrorCode::kInvalid, "activation matrix: expected a use, found none");

    int32_t target = size_;
    if (size_ == capacity_) {
        double best = -1.0;
        for (int32_t i = 0; i < size_; ++i) {
            const auto values = entry(i);
            double product = 0.0, square = 0.0;
            for (size_t e = 0; e < values.size(); ++e) {
                product += static_cast<double>(values[e]) * static_cast<double>(matrix[e]);
                square += static_cast<double>(values[e]) * static_cast<double>(values[e]);
            }
            const double similarity = product / std::sqrt(square);
            if (similarity > best) {
                best = similarity;
                target = i;
            }
        }
    } else {
        ++size_;
    }
    std::copy(
        matrix.begin(), matrix.end(),
        entries_.begin() + static_cast<std::ptrdiff_t>(extent(target) * extent(shape_.total())));
    float squares = 0.0f;
    for (const LayerId layer : shape_.layers()) {
        for (const ExpertId expert : shape_.experts_of(layer)) {
            const float value = matrix[index(expert)];
            columns_[index(expert) * extent(capacity_) + extent(target)] = value;
            squares += value * value;
        }
        squares_[index(layer) * extent(capacity_) + extent(target)] = squares;
    }
}

void check_shape(const Eamc& eamc, ModelShape expected, std::string_view owner) {
    for (const EamCollection* one : {&eamc.prefill, &eamc.decode}) {
        const ModelShape found = one->shape();
        if (found == expected) continue;
        throw Error(ErrorCode::kInvalid,
                    "collection: expected " + std::to_string(expected.num_layers) + " layers of " +
                        std::to_string(expected.num_experts) + " experts as in " +
                        std::string(owner) + ", found " + std::to_string(found.num_layers) +
                        " of " + std::to_string(found.num_experts));
    }
}

EamMatch::EamMatch(const EamCollection& collection) : collection_(collection) {}

void EamMatch::restart() {
    layer_ = LayerId::kNone;
    products_.assign(extent(collection_.size()), 0.0f);
}

void EamMatch::add_row(LayerId layer, std::span<const ExpertId> experts,
                       std::span<const int32_t> counts) {
    layer_ = layer;
    for (size_t i = 0; i < experts.size(); ++i) {
        const float* column = collection_.column(experts[i]).data();
        const float count = counts.empty() ? 1.0f : static_cast<float>(counts[i]);
        for (size_t entry = 0; entry < products_.size(); ++entry) {
            products_[entry] += count * column[entry];
        }
    }
}

void EamMatch::nearest(int32_t count, std::vector<int32_t>& out) {
    out.clear();
    if (!is_some(layer_) || products_.empty()) return;
    similarities_.resize(products_.size());
    const float* squares = collection_.squares_through(layer_).data();
    // The square of the cosine, but for the matrix's own norm, which all entries share.
    for (size_t i = 0; i < products_.size(); ++i) {
        similarities_[i] = products_[i] * products_[i] / std::max(squares[i], 1e-30f);
    }
    for (int32_t n = 0; n < count; ++n) {
        float best = 0.0f;
        for (const float similarity : similarities_) best = std::max(best, similarity);
        if (best == 0.0f) break;
        const auto found = std::find(similarities_.begin(), similarities_.end(), best);
        out.push_back(static_cast<int32_t>(found - similarities_.begin()));
        *found = 0.0f;
    }
}

void normalise_rows(ModelShape shape, std::span<float> matrix) {
    const size_t width = extent(shape.num_experts);
    for (size_t first = 0; first < matrix.size(); first += width) {
        const auto row = matrix.subspan(first, width);
        float sum = 0.0f;
        for (const float value : row) sum += value;
        for (float& value : row)
            value = sum > 0.0f ? value / sum : 1.0f / static_cast<float>(width);
    }
}

void predict_activations(const EamCollection& collection, std::span<const int32_t> matched,
                         std::span<float> out) {
    std::fill(out.begin(), out.end(), 0.0f);
    for (const int32_t index : matched) {
        const auto values = collection.entry(index);
        for (size_t e = 0; e < values.size(); ++e) out[e] += values[e];
    }
    normalise_rows(collection.shape(), out);
}

}  // namespace moeinf
