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
    // The expert is evicted from the slot. kNone: the slot goes too, or no longer holds the expert.
    void on_evict(ExpertId expert, SlotId slot);

    // True if a command was noted and not executed.
    [[nodiscard]] bool has_commands() const noexcept {
        return has_commands_.load(std::memory_order_acquire);
    }

    // Executes the noted commands. Called with no lock held. A command that fails ends as a failed
    // fill.
    void flush() noexcept;

    // True if the bytes of an evicted expert would be copied out of its slot. Only a hint.
    [[nodiscard]] virtual bool accepts_demotion(ExpertId /*expert*/) const { return false; }

    // True if no work is in flight on slots from `first` on. Asked before their memory is released.
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

    // execute() is called with `issuing` held; after_execute() follows with no lock held.
    virtual void execute(std::span<const Command> commands) noexcept = 0;
    virtual void after_execute() noexcept {}

    // The commands that were noted and not executed, for a destructor.
    [[nodiscard]] std::vector<Command> take_commands();

    std::mutex issuing;  // held while work is enqueued

private:
    void note(Command command);

    const bool hears_evictions_;
    std::mutex mutex_;  // guards the next
    std::vector<Command> commands_;
    std::vector<Command> executing_;  // guarded by `issuing`
    std::atomic<bool> has_commands_{false};
};

}  // namespace moeinf
