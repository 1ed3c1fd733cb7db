#include "tier/source.h"

#include <utility>

namespace moeinf {

void Source::note(Command command) {
    const std::lock_guard lock(mutex_);
    commands_.push_back(std::move(command));
    has_commands_.store(true, std::memory_order_release);
}

void Source::fill(FillPtr fill) {
    const ExpertId expert = fill->expert;
    const SlotId slot = fill->slot;
    note({Command::Kind::kFill, std::move(fill), expert, slot});
}

void Source::promote(FillPtr fill) {
    const ExpertId expert = fill->expert;
    const SlotId slot = fill->slot;
    note({Command::Kind::kPromote, std::move(fill), expert, slot});
}

void Source::on_evict(ExpertId expert, SlotId slot) {
    if (hears_evictions_) note({Command::Kind::kEvict, nullptr, expert, slot});
}

std::vector<Source::Command> Source::take_commands() {
    const std::lock_guard lock(mutex_);
    return std::exchange(commands_, {});
}

void Source::flush() noexcept {
    if (!has_commands()) return;
    {
        const std::lock_guard lock(issuing);
        {
            const std::lock_guard queue(mutex_);
            executing_.swap(commands_);
        }
        execute(executing_);
        executing_.clear();
        // Cleared only now, because no fence knows the work of a command before it is enqueued.
        const std::lock_guard queue(mutex_);
        has_commands_.store(!commands_.empty(), std::memory_order_release);
    }
    after_execute();
}

}  // namespace moeinf
