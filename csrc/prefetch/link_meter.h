// The link as a prefetcher sees it: which reads are under way, how fast they are, and how long the
// link rests between the demand reads of a layer and the next step. Times come in as seconds.
#pragma once

#include <algorithm>
#include <vector>

#include "base/ids.h"

namespace moeinf {

class LinkMeter {
public:
    LinkMeter(ModelShape shape, int64_t expert_bytes)
        : expert_bytes_(static_cast<double>(expert_bytes)),
          prefetching_(shape.total()),
          idle_seconds_(shape.num_layers, -1) {}

    void read_started(ExpertId expert, bool demand, double now) {
        if (demands_ + prefetches_ == 0) {
            busy_since_ = now;
            busy_bytes_ = 0;
        }
        ++(demand ? demands_ : prefetches_);
        if (!demand) prefetching_[expert] = 1;
    }

    // Returns how long a step has waited for the prefetch that ends; below 0: no step did.
    double read_ended(ExpertId expert, bool demand, bool complete, double now) {
        --(demand ? demands_ : prefetches_);
        if (demand && demands_ == 0) needed_until_ = now;
        if (complete) busy_bytes_ += expert_bytes_;
        if (demands_ + prefetches_ == 0) {
            read_bytes_ = kKeep * read_bytes_ + busy_bytes_;
            read_seconds_ = kKeep * read_seconds_ + (now - busy_since_);
        }
        if (demand) return -1;
        prefetching_[expert] = 0;
        const auto wait = std::ranges::find(waits_, expert, &Wait::expert);
        if (wait == waits_.end()) return -1;
        const double waited = now - wait->since;
        waits_.erase(wait);
        needed_until_ = now;
        return waited;
    }

    // A step needs a prefetch that is still under way.
    void wait_for(ExpertId expert, double now) { waits_.push_back({expert, now}); }

    // The demand reads of a step have been started.
    void demands_started(double now) { needed_until_ = std::max(needed_until_, now); }

    // The step after that of `layer` begins.
    void next_step(LayerId layer, double now) {
        const double idle = demands_ > 0 || !waits_.empty() ? 0.0 : now - needed_until_;
        double& usual = idle_seconds_[layer];
        usual = usual < 0 ? idle : usual + kIdleRate * (idle - usual);
    }

    [[nodiscard]] bool prefetching(ExpertId expert) const { return prefetching_[expert] != 0; }
    [[nodiscard]] int32_t prefetches() const noexcept { return prefetches_; }
    [[nodiscard]] double bytes_per_second() const noexcept {
        return read_seconds_ > 0 ? read_bytes_ / read_seconds_ : 0.0;
    }
    // What the link could carry while it usually rests after a step of the layer.
    [[nodiscard]] double idle_bytes(LayerId layer) const {
        return std::max(0.0, idle_seconds_[layer]) * bytes_per_second();
    }

private:
    static constexpr double kIdleRate = 0.1;
    static constexpr double kKeep = 0.95;
    struct Wait {
        ExpertId expert;
        double since;
    };

    double expert_bytes_;
    PerExpert<uint8_t> prefetching_;
    PerLayer<double> idle_seconds_;           // below 0: not known
    std::vector<Wait> waits_;                 // for prefetches
    int32_t demands_ = 0, prefetches_ = 0;    // reads under way
    double needed_until_ = 0;                 // when the latest step had all that it needs
    double busy_since_ = 0, busy_bytes_ = 0;  // since a read is under way
    double read_bytes_ = 0, read_seconds_ = 0;
};

}  // namespace moeinf
