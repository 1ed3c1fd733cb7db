// Which experts stay after a long prompt. Such a prompt needs nearly every expert of every layer. A
// policy alone would leave those of the last layers, which came last. So each layer keeps a share
// of the frames, for the experts that the latest tokens of the prompt use most. Decoding begins
// with these. A few frames belong to no layer: experts pass through them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"
#include "policy/policy.h"

namespace moeinf {

class PromptShares {
public:
    explicit PromptShares(ModelShape shape);

    // The step of a long prompt, of which `recent` is known: its layer keeps other experts from now
    // on.
    void begin(const Step& step, int32_t frames);
    // The experts of that step, those that its layer keeps first.
    [[nodiscard]] std::span<const ExpertId> experts() const noexcept { return ordered_; }
    // True if a layer keeps it.
    [[nodiscard]] bool keeps(ExpertId expert) const noexcept { return kept_[expert] != 0; }
    // The prompt is over: no layer keeps any.
    void end() noexcept;

    // Victims for the step's experts, in the policy's order: unpinned residents that no layer
    // keeps, and no more of a layer than it has beyond its share. `missing` of the experts that the
    // step's layer keeps are not resident yet. Returns their number.
    size_t choose_victims(Policy& policy, std::span<const ExpertId> residents, const Pins& pins,
                          std::span<const ExpertId> missing, std::span<ExpertId> victims);

private:
    ModelShape shape_;
    int32_t share_ = 0;
    bool in_progress_ = false;
    PerExpert<uint8_t> kept_;
    std::vector<size_t> by_use_;       // scratch
    std::vector<ExpertId> ordered_;    // of the step
    Pins spared_;                      // scratch
    PerLayer<int32_t> beyond_;         // scratch: residents of a layer beyond its share
    std::vector<ExpertId> evictable_;  // scratch
};

}  // namespace moeinf
