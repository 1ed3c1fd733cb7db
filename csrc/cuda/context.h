// The primary context of a device, which torch uses too. It is retained while an object of ours
// lives in it. Any thread may call, so every call makes the context current first.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "cuda/driver.h"

namespace moeinf::cuda {

class Context {
public:
    Context(std::shared_ptr<const Driver> driver, int32_t index);
    ~Context();
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

    [[nodiscard]] const Driver& driver() const noexcept { return *driver_; }
    [[nodiscard]] int32_t index() const noexcept { return index_; }
    [[nodiscard]] std::string name() const;
    [[nodiscard]] int attribute(int which) const;

private:
    friend class ContextGuard;

    std::shared_ptr<const Driver> driver_;
    int32_t index_;
    DeviceHandle device_ = 0;
    Handle context_ = nullptr;
};

// Makes the context current for this thread while the guard lives. A guard for a destructor never
// throws: it converts to false if the driver has shut down or the process was forked.
class ContextGuard {
public:
    enum class For { kCall, kDestructor };

    explicit ContextGuard(const Context& context, For purpose = For::kCall);
    ~ContextGuard();
    ContextGuard(const ContextGuard&) = delete;
    ContextGuard& operator=(const ContextGuard&) = delete;

    explicit operator bool() const noexcept { return pushed_; }

private:
    const Driver& driver_;
    bool pushed_ = false;
};

}  // namespace moeinf::cuda
