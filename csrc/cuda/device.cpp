// Device over the CUDA driver.
#include <algorithm>
#include <mutex>
#include <utility>

#include "base/error.h"
#include "cuda/arenas.h"
#include "cuda/context.h"
#include "cuda/cuda.h"
#include "cuda/gather_table.h"
#include "cuda/kernels.h"

namespace moeinf {
namespace {

using namespace cuda;

constexpr unsigned kGatherThreads = 256;
constexpr unsigned kBlocksPerProcessor = 4;
constexpr uint64_t kGatherLoad = 16;
static_assert(GatherTable::kMax == Device::kMaxGatherParts);

DevicePointer address(const std::byte* device) {
    return reinterpret_cast<DevicePointer>(device);
}

class CudaDevice final : public Device {
public:
    CudaDevice(std::shared_ptr<const Driver> driver, int32_t index)
        : context_(std::make_shared<Context>(std::move(driver), index)),
          driver_(context_->driver()),
          processors_(context_->attribute(kAttributeMultiprocessors)),
          same_addresses_(context_->attribute(kAttributeHostPointersAreDevicePointers) != 0) {
        const ContextGuard current(*context_);
        int least = 0;
        driver_.check(driver_.stream_priority_range(&least, &urgent_priority_),
                      "cuCtxGetStreamPriorityRange");
    }

    ~CudaDevice() override {
        const ContextGuard current(*context_, ContextGuard::For::kDestructor);
        if (current && module_ != nullptr) driver_.module_unload(module_);
    }

    CudaDevice(const CudaDevice&) = delete;
    CudaDevice& operator=(const CudaDevice&) = delete;

    std::string name() const override { return context_->name(); }
    int32_t index() const noexcept override { return context_->index(); }
    int32_t driver_version() const override {
        int version = 0;
        driver_.check(driver_.driver_get_version(&version), "cuDriverGetVersion");
        return version;
    }
    bool is_fake() const noexcept override { return driver_.is_fake; }
    uint64_t free_bytes() const override { return memory().first; }
    uint64_t total_bytes() const override { return memory().second; }

    std::unique_ptr<Arena> make_arena(size_t reserve_bytes) override {
        return make_device_arena(context_, reserve_bytes);
    }

    std::unique_ptr<Arena> make_pinned_arena(size_t reserve_bytes, size_t unit) override {
        return cuda::make_pinned_arena(context_, reserve_bytes, unit);
    }

    Stream create_stream(bool urgent) override {
        const ContextGuard current(*context_);
        Handle stream = nullptr;
        driver_.check(
            driver_.stream_create(&stream, kStreamNonBlocking, urgent ? urgent_priority_ : 0),
            "cuStreamCreateWithPriority");
        return stream;
    }

    void destroy_stream(Stream stream) noexcept override {
        const ContextGuard current(*context_, ContextGuard::For::kDestructor);
        if (current) driver_.stream_destroy(stream);
    }

    // A host thread spins while it waits for such an event, unless the context says otherwise.
    // torch spins too. The host waits for the router's ids in every layer, and a blocked thread
    // takes tens of microseconds to wake up.
    Event create_event() override {
        const ContextGuard current(*context_);
        Handle event = nullptr;
        driver_.check(driver_.event_create(&event, kEventDisableTiming), "cuEventCreate");
        return event;
    }

    void destroy_event(Event event) noexcept override {
        const ContextGuard current(*context_, ContextGuard::For::kDestructor);
        if (current) driver_.event_destroy(event);
    }

    void record(Event event, Stream stream) override {
        const ContextGuard current(*context_);
        driver_.check(driver_.event_record(event, stream), "cuEventRecord");
    }

    void wait(Stream stream, Event event) override {
        const ContextGuard current(*context_);
        driver_.check(driver_.stream_wait_event(stream, event, 0), "cuStreamWaitEvent");
    }

    bool finished(Event event) override {
        const ContextGuard current(*context_);
        const Result result = driver_.event_query(event);
        if (result == kNotReady) return false;
        driver_.check(result, "cuEventQuery");
        return true;
    }

    void synchronize(Event event) override {
        const ContextGuard current(*context_);
        driver_.check(driver_.event_synchronize(event), "cuEventSynchronize");
    }

    void set_relaxed_capture_mode() noexcept override {
        int mode = kCaptureRelaxed;  // the call writes the earlier mode here; nobody needs it
        (void)driver_.exchange_capture_mode(&mode);
    }

    void copy_in(std::byte* device, const std::byte* host, size_t nbytes, Stream stream) override {
        const ContextGuard current(*context_);
        driver_.check(driver_.copy_host_to_device(address(device), host, nbytes, stream),
                      "cuMemcpyHtoDAsync");
    }

    void copy_out(std::byte* host, const std::byte* device, size_t nbytes, Stream stream) override {
        const ContextGuard current(*context_);
        driver_.check(driver_.copy_device_to_host(host, address(device), nbytes, stream),
                      "cuMemcpyDtoHAsync");
    }

    // A fake driver does the work of the kernel itself.
    bool can_gather() const noexcept override {
        return kernel_image() != nullptr || driver_.is_fake;
    }

    void gather(std::span<const GatherPart> parts, Stream stream) override {
        if (!can_gather()) {
            throw Error(ErrorCode::kUnsupported,
                        "this build has no kernels for CUDA: it was built where nvcc was not");
        }
        if (parts.size() > kMaxGatherParts) {
            throw Error(ErrorCode::kInvalid, "expected at most " + std::to_string(kMaxGatherParts) +
                                                 " parts to gather, found " +
                                                 std::to_string(parts.size()));
        }
        if (parts.empty()) return;
        const ContextGuard current(*context_);
        GatherTable table;
        uint64_t longest = 0;
        for (size_t i = 0; i < parts.size(); ++i) {
            table.parts[i] = as_seen_by_device(parts[i]);
            longest = std::max(longest, parts[i].nbytes);
        }
        // As many blocks as fill the device, the same number for each part, and no idle block.
        const uint64_t useful = (longest / kGatherLoad + kGatherThreads - 1) / kGatherThreads;
        const uint64_t share =
            std::max<uint64_t>(uint64_t(processors_) * kBlocksPerProcessor / parts.size(), 1);
        const auto blocks = static_cast<unsigned>(std::max<uint64_t>(std::min(useful, share), 1));
        void* parameters[] = {&table};
        driver_.check(driver_.launch_kernel(gather_function(), blocks, unsigned(parts.size()), 1,
                                            kGatherThreads, 1, 1, 0, stream, parameters, nullptr),
                      "cuLaunchKernel(moeinf_gather)");
    }

private:
    std::pair<uint64_t, uint64_t> memory() const {
        const ContextGuard current(*context_);
        size_t free = 0;
        size_t total = 0;
        driver_.check(driver_.mem_get_info(&free, &total), "cuMemGetInfo");
        return {free, total};
    }

    GatherTable::Part as_seen_by_device(const GatherPart& part) const {
        DevicePointer source = address(part.source);
        if ((source | address(part.target) | part.nbytes) % kGatherLoad != 0) {
            throw Error(ErrorCode::kInvalid,
                        "expected addresses and sizes to gather that are multiples of 16, found " +
                            std::to_string(part.nbytes) + " bytes from " + std::to_string(source) +
                            " to " + std::to_string(address(part.target)));
        }
        if (!same_addresses_) {
            driver_.check(
                driver_.host_get_device_pointer(&source, const_cast<std::byte*>(part.source), 0),
                "cuMemHostGetDevicePointer");
        }
        return {source, address(part.target), part.nbytes};
    }

    // Loaded at first use: a device that never gathers holds no module.
    Handle gather_function() {
        const std::lock_guard lock(module_mutex_);
        if (gather_ == nullptr) {
            const void* image = kernel_image() != nullptr ? kernel_image() : "";
            if (module_ == nullptr) {
                driver_.check(driver_.module_load_data(&module_, image), "cuModuleLoadData");
            }
            driver_.check(driver_.module_get_function(&gather_, module_, "moeinf_gather"),
                          "cuModuleGetFunction(moeinf_gather)");
        }
        return gather_;
    }

    std::shared_ptr<const Context> context_;
    const Driver& driver_;
    int processors_;
    bool same_addresses_;
    int urgent_priority_ = 0;
    std::mutex module_mutex_;  // guards the two below
    Handle module_ = nullptr;
    Handle gather_ = nullptr;
};

}  // namespace

std::shared_ptr<Device> open_cuda_device(int32_t index, std::string library) {
    return std::make_shared<CudaDevice>(load_driver(std::move(library)), index);
}

}  // namespace moeinf
