#include "cuda/context.h"

#include <utility>

#include "base/error.h"

namespace moeinf::cuda {

Context::Context(std::shared_ptr<const Driver> driver, int32_t index)
    : driver_(std::move(driver)), index_(index) {
    int count = 0;
    driver_->check(driver_->device_get_count(&count), "cuDeviceGetCount");
    if (count == 0) {
        throw Error(ErrorCode::kUnsupported,
                    "the CUDA driver " + driver_->library + " finds no device");
    }
    if (index < 0 || index >= count) {
        throw Error(ErrorCode::kInvalid, "expected a CUDA device index from 0 to " +
                                             std::to_string(count - 1) + ", found " +
                                             std::to_string(index));
    }
    driver_->check(driver_->device_get(&device_, index), "cuDeviceGet");
    if (attribute(kAttributeVirtualMemory) == 0) {
        throw Error(ErrorCode::kUnsupported, "CUDA device " + std::to_string(index) + " (" +
                                                 name() + ") cannot map memory in pieces");
    }
    driver_->check(driver_->primary_context_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

Context::~Context() {
    if (!forked_since_use()) driver_->primary_context_release(device_);
}

std::string Context::name() const {
    char text[256] = {};
    driver_->check(driver_->device_get_name(text, sizeof(text) - 1, device_), "cuDeviceGetName");
    return text;
}

int Context::attribute(int which) const {
    int value = 0;
    driver_->check(driver_->device_get_attribute(&value, which, device_), "cuDeviceGetAttribute");
    return value;
}

ContextGuard::ContextGuard(const Context& context, For purpose) : driver_(context.driver()) {
    if (purpose == For::kDestructor) {
        pushed_ = !forked_since_use() && driver_.context_push(context.context_) == kSuccess;
        return;
    }
    check_not_forked();
    driver_.check(driver_.context_push(context.context_), "cuCtxPushCurrent");
    pushed_ = true;
}

ContextGuard::~ContextGuard() {
    Handle popped = nullptr;
    if (pushed_) driver_.context_pop(&popped);
}

}  // namespace moeinf::cuda
