#include "cpu_kernels/formats/formats.h"

#include <array>

#include "base/find_name.h"
#include "cpu_kernels/formats/decoders.h"

namespace moeinf {
namespace {

template <class Decoder>
constexpr FormatFacts facts_of() {
    using Stored = typename Decoder::Stored;
    int64_t group = 0;
    if constexpr (requires { Decoder::kGroup; }) group = Decoder::kGroup;
    int64_t tail = 0;
    int64_t most_cols = 0;
    if constexpr (is_palette<Decoder>) {
        tail = Decoder::kTail;
        most_cols = kMostPaletteCols;
    }
    return {Decoder::kName,     sizeof(Stored), alignof(Stored),
            Decoder::kPack,     group,          Decoder::kScaled,
            has_zeros<Decoder>, tail,           most_cols};
}

template <class... Rows>
constexpr std::array<FormatFacts, sizeof...(Rows)> all_facts(std::tuple<Rows...>* /*table*/) {
    return {facts_of<Rows>()...};
}

constexpr auto kFacts = all_facts(static_cast<Decoders*>(nullptr));

}  // namespace

const FormatFacts& facts(WeightFormat format) {
    return kFacts[static_cast<size_t>(format)];
}

std::vector<std::string> format_names() {
    std::vector<std::string> names;
    for (const FormatFacts& format : kFacts) names.emplace_back(format.name);
    return names;
}

WeightFormat find_format(std::string_view name) {
    return static_cast<WeightFormat>(find_name(format_names(), name, "weight format"));
}

}  // namespace moeinf
