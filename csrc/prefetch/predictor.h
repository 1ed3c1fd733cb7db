// What guesses which experts come next. A predictor sees the same steps as a policy and, after one,
// scores the experts of the layers that follow; the prefetcher decides what to do about it. It
// never sees bytes, slots, leases or threads, and is called under the cache's lock: it must answer
// in about a microsecond.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "policy/policy.h"

namespace moeinf {

class Predictor {
public:
    virtual ~Predictor() = default;
    virtual std::string_view name() const noexcept = 0;

    // Every step, in order.
    virtual void observe(const Step& step) = 0;

    // How many layers after that of the latest step predict() may be asked about.
    [[nodiscard]] virtual int32_t reach() const noexcept { return 1; }

    // Writes how likely each expert of `layer` is to be used when the layer comes next, in [0, 1].
    // Layer 0 comes after the last. False, and nothing is written, where nothing is known.
    virtual bool predict(LayerId layer, std::span<float> scores) = 0;

    // A copy of what it has collected; null: it collects nothing.
    [[nodiscard]] virtual std::unique_ptr<Collection> collection() const { return nullptr; }
};

// The names make_predictor accepts, in the order they are shown.
std::vector<std::string> predictor_names();

// What `prefetch` may be: off, every predictor, and external, which is told what comes.
std::vector<std::string> prefetch_names();

// `from`: a collection to start from; null: none. Throws Error(kInvalid), naming what exists, for
// an unknown name.
std::unique_ptr<Predictor> make_predictor(std::string_view name, ModelShape shape,
                                          const Collection* from = nullptr);

}  // namespace moeinf
