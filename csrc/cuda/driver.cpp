#include "cuda/driver.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <utility>

#include "base/error.h"
#include "base/fork.h"

namespace moeinf::cuda {
namespace {

// Of the process that used the driver first. Global, like the driver itself.
std::atomic<int64_t> generation_of_use{-1};

[[noreturn]] void unsupported(const std::string& message) {
    throw Error(ErrorCode::kUnsupported, message);
}

std::string chosen_library(std::string library) {
    if (!library.empty()) return library;
    const char* named = std::getenv("MOEINF_CUDA_DRIVER");
    return named != nullptr && *named != '\0' ? named : "libcuda.so.1";
}

std::string version_text(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

template <typename Function>
void load(void* handle, const std::string& library, const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(handle, name));
    if (function == nullptr) {
        unsupported("the CUDA driver " + library + " is too old: it has no " + name +
                    ", expected a driver for CUDA " + version_text(kOldestDriver) + " or newer");
    }
}

}  // namespace

bool forked_since_use() noexcept {
    const int64_t generation = generation_of_use.load(std::memory_order_relaxed);
    return generation >= 0 && generation != process_generation();
}

void check_not_forked() {
    if (forked_since_use()) {
        unsupported(
            "this process was forked from one that had used CUDA, and the driver does not "
            "survive that: start it with the spawn method, or fork before CUDA is first used");
    }
}

std::string Driver::words(Result result) const {
    const char* name = nullptr;
    const char* text = nullptr;
    get_error_name(result, &name);
    get_error_string(result, &text);
    return (name != nullptr ? std::string(name) : "error " + std::to_string(result)) +
           (text != nullptr ? " (" + std::string(text) + ")" : "");
}

void Driver::check(Result result, const char* call) const {
    if (result != kSuccess) unsupported(std::string(call) + ": " + words(result));
}

std::shared_ptr<const Driver> load_driver(std::string library) {
    check_not_forked();
    library = chosen_library(std::move(library));
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        const char* why = dlerror();
        unsupported("no CUDA driver: cannot load " + library + ": " +
                    (why != nullptr ? why : "no reason given"));
    }
    auto driver = std::make_shared<Driver>();
    driver->library = library;
    driver->is_fake = dlsym(handle, "moeinf_fake_cuda") != nullptr;
#define MOEINF_LOAD(member, exported, parameters) load(handle, library, #exported, driver->member);
    MOEINF_DRIVER_FUNCTIONS(MOEINF_LOAD)
#undef MOEINF_LOAD

    // The version is read before initialisation, because an old driver may crash in it.
    int version = 0;
    driver->check(driver->driver_get_version(&version), "cuDriverGetVersion");
    if (version < kOldestDriver) {
        unsupported("the CUDA driver " + library + " is too old: it is for CUDA " +
                    version_text(version) + ", expected " + version_text(kOldestDriver) +
                    " or newer");
    }
    const Result result = driver->init(0);
    if (result == kNoDevice) unsupported("the CUDA driver " + library + " finds no device");
    driver->check(result, "cuInit");
    int64_t never = -1;
    generation_of_use.compare_exchange_strong(never, process_generation());
    return driver;
}

}  // namespace moeinf::cuda
