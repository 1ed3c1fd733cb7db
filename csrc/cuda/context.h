// A device's primary context, which torch uses too: retained while anything of ours lives in it,
// made current around every call, for any thread may call.
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
    friend class Current;

    std::shared_ptr<const Driver> driver_;
    int32_t index_;
    DeviceHandle device_ = 0;
    Handle context_ = nullptr;
};

// While one lives, the context is this thread's current one. Converts to false, having thrown
// nothing, only where it was made for a destructor and the driver is gone or forked away.
class Current {
public:
    enum class For { kCall, kDestructor };

    explicit Current(const Context& context, For purpose = For::kCall);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

    explicit operator bool() const noexcept { return pushed_; }

private:
    const Driver& driver_;
    bool pushed_ = false;
};

}  // namespace moeinf::cuda
