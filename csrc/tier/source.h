// Where a tier's bytes come from: files, or the tier below. A tier notes commands under its lock;
// the source carries them out later, in the order in which they were noted, with no lock of a tier
// held. A fill ends with a call of Tier::end_fill.
#pragma once

#include <atomic>
#include <mutex>
#include <span>
#include <vector>

#include "base/ids.h"
#include "tier/fill.h"

namespace moeinf {

class Source {
public:
    virtual ~Source() = default;
    Source(const Source&) = delete;
    Source& operator=(const Source&) = delete;

    // Only take note. Called under the tier's lock.
    void fill(FillPtr fill);
    void promote(FillPtr fill);  // a prefetch becomes a demand
    // An expert leaves the slot that it filled. kNone: the slot goes too, or holds it no more.
    void on_evict(ExpertId expert, SlotId slot);

    // Has something been noted that has not been carried out?
    [[nodiscard]] bool has_commands() const noexcept {
        return has_commands_.load(std::memory_order_acquire);
    }

    // Carries out what was noted. Called with no lock held. A command that fails ends as a failed
    // fill.
    void flush() noexcept;

    // Would the bytes of an expert that leaves be copied out of its slot? It may yet change.
    [[nodiscard]] virtual bool accepts_demotion(ExpertId /*expert*/) const { return false; }

    // Is nothing under way on slots from `first` on? Asked before their memory is given back.
    [[nodiscard]] virtual bool is_idle(SlotId /*first*/) { return !has_commands(); }

protected:
    struct Command {
        enum class Kind : uint8_t { kFill, kPromote, kEvict } kind;
        FillPtr fill;  // not of kEvict
        ExpertId expert;
        SlotId slot;
    };

    // `hears_evictions`: on_evict becomes a command; without it, nothing.
    explicit Source(bool hears_evictions) : hears_evictions_(hears_evictions) {}

    // Called with `issuing` held. The second is called after that, with no lock held.
    virtual void execute(std::span<const Command> commands) noexcept = 0;
    virtual void after_execute() noexcept {}

    // What has been noted and not carried out, for a destructor.
    [[nodiscard]] std::vector<Command> take_commands();

    std::mutex issuing;  // whoever enqueues work holds it

private:
    void note(Command command);

    const bool hears_evictions_;
    std::mutex mutex_;  // guards the next
    std::vector<Command> commands_;
    std::vector<Command> executing_;  // guarded by `issuing`
    std::atomic<bool> has_commands_{false};
};

}  // namespace moeinf
