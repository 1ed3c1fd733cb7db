// Handles that C sees. A handle is a number: the place of an object in a table, and the generation
// of that place. So a handle that was given back is recognised, also after its place is used again.
//
//     add() --> live --take(), or take_unused() where nothing else uses the object--> stale
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"

namespace moeinf::capi {

struct InUse : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Thread-safe. `Tag` is the type of the pointer that C holds and never follows.
template <class Tag, class T>
class Handles {
public:
    explicit Handles(std::string name) : name_(std::move(name)) {}

    [[nodiscard]] Tag* add(std::shared_ptr<T> object) {
        const std::lock_guard lock(mutex_);
        if (free_.empty()) {
            if (entries_.size() == kMost) {
                throw Error(ErrorCode::kCapacity, "too many handles are alive: " + name_);
            }
            entries_.emplace_back();
            free_.push_back(entries_.size() - 1);
        }
        const size_t place = free_.back();
        free_.pop_back();
        entries_[place].object = std::move(object);
        return reinterpret_cast<Tag*>(entries_[place].generation << kPlaceBits | place);
    }

    // Throws Error(kInvalid) for every handle but a live one.
    [[nodiscard]] std::shared_ptr<T> get(Tag* handle) {
        const std::lock_guard lock(mutex_);
        return find(handle).object;
    }

    [[nodiscard]] std::shared_ptr<T> take(Tag* handle) {
        const std::lock_guard lock(mutex_);
        return take_entry(handle, find(handle));
    }

    // Throws InUse if anything but the table holds the object. No call can begin to use it then,
    // because a call gets it under the same lock.
    [[nodiscard]] std::shared_ptr<T> take_unused(Tag* handle) {
        const std::lock_guard lock(mutex_);
        Entry& entry = find(handle);
        if (entry.object.use_count() > 1) throw InUse("the " + name_ + " is in use");
        return take_entry(handle, entry);
    }

private:
    static_assert(sizeof(uintptr_t) == 8);
    static constexpr int kPlaceBits = 24;
    static constexpr uintptr_t kMost = uintptr_t{1} << kPlaceBits;

    struct Entry {
        std::shared_ptr<T> object;
        uintptr_t generation = 1;  // never 0, so that no handle is NULL
    };

    Entry& find(Tag* handle) {
        const auto number = reinterpret_cast<uintptr_t>(handle);
        const uintptr_t place = number % kMost;
        if (number == 0) throw Error(ErrorCode::kInvalid, "expected a " + name_ + ", found NULL");
        if (place >= entries_.size() || entries_[place].object == nullptr ||
            entries_[place].generation != number >> kPlaceBits) {
            throw Error(ErrorCode::kInvalid,
                        "expected a " + name_ + ", found a handle that is none or was given back");
        }
        return entries_[place];
    }

    std::shared_ptr<T> take_entry(Tag* handle, Entry& entry) {
        free_.push_back(reinterpret_cast<uintptr_t>(handle) % kMost);
        ++entry.generation;
        return std::exchange(entry.object, nullptr);
    }

    const std::string name_;
    std::mutex mutex_;  // guards what follows
    std::vector<Entry> entries_;
    std::vector<size_t> free_;
};

}  // namespace moeinf::capi
