#include "policy/eam.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "base/error.h"

namespace moeinf {
namespace {

size_t at(int32_t index) {
    return static_cast<size_t>(index);
}

}  // namespace

EamCollection::EamCollection(PolicyShape shape, int32_t capacity)
    : shape_(shape), capacity_(capacity) {
    if (capacity < 1) {
        throw Error(ErrorCode::kInvalid,
                    "a collection needs room for 1 matrix, not " + std::to_string(capacity));
    }
    entries_.resize(at(shape.total()) * at(capacity));
    columns_.resize(at(shape.total()) * at(capacity));
    squares_.resize(at(shape.num_layers) * at(capacity));
}

std::span<const float> EamCollection::column(int32_t expert) const noexcept {
    return {columns_.data() + at(expert) * at(capacity_), at(size_)};
}

std::span<const float> EamCollection::squares_through(int32_t layer) const noexcept {
    return {squares_.data() + at(layer) * at(capacity_), at(size_)};
}

std::span<const float> EamCollection::entry(int32_t index) const noexcept {
    const size_t size = at(shape_.total());
    return {entries_.data() + at(index) * size, size};
}

void EamCollection::add(std::span<const float> matrix) {
    if (matrix.size() != at(shape_.total())) {
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

    int32_t index = size_;
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
                index = i;
            }
        }
    } else {
        ++size_;
    }
    std::copy(matrix.begin(), matrix.end(),
              entries_.begin() + static_cast<std::ptrdiff_t>(at(index) * at(shape_.total())));
    float squares = 0.0f;
    for (int32_t layer = 0; layer < shape_.num_layers; ++layer) {
        for (int32_t e = layer * shape_.num_experts; e < (layer + 1) * shape_.num_experts; ++e) {
            const float value = matrix[at(e)];
            columns_[at(e) * at(capacity_) + at(index)] = value;
            squares += value * value;
        }
        squares_[at(layer) * at(capacity_) + at(index)] = squares;
    }
}

void check_shape(const Eamc& eamc, PolicyShape expected, std::string_view owner) {
    for (const EamCollection* one : {&eamc.prefill, &eamc.decode}) {
        const PolicyShape found = one->shape();
        if (found.num_layers == expected.num_layers && found.num_experts == expected.num_experts) {
            continue;
        }
        throw Error(ErrorCode::kInvalid,
                    "collection: expected " + std::to_string(expected.num_layers) + " layers of " +
                        std::to_string(expected.num_experts) + " experts as in " +
                        std::string(owner) + ", found " + std::to_string(found.num_layers) +
                        " of " + std::to_string(found.num_experts));
    }
}

EamMatch::EamMatch(const EamCollection& collection) : collection_(collection) {}

void EamMatch::restart() {
    layer_ = -1;
    products_.assign(at(collection_.size()), 0.0f);
}

void EamMatch::add_row(int32_t layer, std::span<const int32_t> experts,
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
    if (layer_ < 0 || products_.empty()) return;
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

void normalise_rows(PolicyShape shape, std::span<float> matrix) {
    const size_t width = at(shape.num_experts);
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

std::vector<std::pair<float, int32_t>> prefetch_order(std::span<const float> predicted,
                                                      PolicyShape shape, int32_t layer,
                                                      size_t limit) {
    std::vector<std::pair<float, int32_t>> order;
    for (int32_t i = layer + 1; i < shape.num_layers; ++i) {
        const float nearness =
            1.0f - static_cast<float>(i - layer) / static_cast<float>(shape.num_layers);
        for (int32_t e = i * shape.num_experts; e < (i + 1) * shape.num_experts; ++e) {
            if (predicted[at(e)] > 0.0f) order.emplace_back(predicted[at(e)] * nearness, e);
        }
    }
    const size_t kept = std::min(limit, order.size());
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(),
                      [](const auto& a, const auto& b) {
                          return a.first > b.first || (a.first == b.first && a.second < b.second);
                      });
    order.resize(kept);
    return order;
}

}  // namespace moeinf
