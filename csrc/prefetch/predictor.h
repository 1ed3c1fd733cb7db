// A predictor scores the experts of the next layers after each step. It sees the same steps as a
// policy; the prefetcher decides which experts to read. It never sees bytes, slots, leases or
// threads. It is called under the cache's lock, so it must answer in about a microsecond.
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

    // predict() may be called for this many layers after that of the latest step.
    [[nodiscard]] virtual int32_t reach() const noexcept { return 1; }

    // Writes the probability that each expert of `layer` is used when the layer comes next. Layer 0
    // comes after the last. Returns false and writes nothing if nothing is known.
    virtual bool predict(LayerId layer, std::span<float> scores) = 0;

    // A copy of the data that it has collected. Null if it collects none.
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
