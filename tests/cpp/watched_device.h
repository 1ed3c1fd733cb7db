// A device that forwards to another device and tells a watcher when each call begins and ends. The
// time inside the calls is the driver's; the rest is ours.
#pragma once

#include <memory>
#include <utility>

#include "device/device.h"

struct DeviceWatcher {
    virtual ~DeviceWatcher() = default;
    virtual void call_begins() = 0;
    virtual void call_ends() = 0;
};

class WatchedDevice final : public moeinf::Device {
public:
    WatchedDevice(std::shared_ptr<moeinf::Device> device, DeviceWatcher& watcher)
        : device_(std::move(device)), watcher_(watcher) {}

    std::string name() const override { return device_->name(); }
    int32_t index() const noexcept override { return device_->index(); }
    int32_t driver_version() const override { return device_->driver_version(); }
    bool is_fake() const noexcept override { return device_->is_fake(); }
    uint64_t free_bytes() const override { return device_->free_bytes(); }
    uint64_t total_bytes() const override { return device_->total_bytes(); }
    bool can_gather() const noexcept override { return device_->can_gather(); }

    std::unique_ptr<moeinf::Arena> make_arena(size_t nbytes) override {
        const Watched here(watcher_);
        return device_->make_arena(nbytes);
    }
    std::unique_ptr<moeinf::Arena> make_pinned_arena(size_t nbytes, size_t unit) override {
        const Watched here(watcher_);
        return device_->make_pinned_arena(nbytes, unit);
    }
    moeinf::Stream create_stream(bool urgent) override {
        const Watched here(watcher_);
        return device_->create_stream(urgent);
    }
    void destroy_stream(moeinf::Stream stream) noexcept override {
        const Watched here(watcher_);
        device_->destroy_stream(stream);
    }
    moeinf::Event create_event() override {
        const Watched here(watcher_);
        return device_->create_event();
    }
    void destroy_event(moeinf::Event event) noexcept override {
        const Watched here(watcher_);
        device_->destroy_event(event);
    }
    void record(moeinf::Event event, moeinf::Stream stream) override {
        const Watched here(watcher_);
        device_->record(event, stream);
    }
    void wait(moeinf::Stream stream, moeinf::Event event) override {
        const Watched here(watcher_);
        device_->wait(stream, event);
    }
    bool finished(moeinf::Event event) override {
        const Watched here(watcher_);
        return device_->finished(event);
    }
    void synchronize(moeinf::Event event) override {
        const Watched here(watcher_);
        device_->synchronize(event);
    }
    void set_relaxed_capture_mode() noexcept override {
        const Watched here(watcher_);
        device_->set_relaxed_capture_mode();
    }
    void copy_in(std::byte* device, const std::byte* host, size_t nbytes,
                 moeinf::Stream stream) override {
        const Watched here(watcher_);
        device_->copy_in(device, host, nbytes, stream);
    }
    void copy_out(std::byte* host, const std::byte* device, size_t nbytes,
                  moeinf::Stream stream) override {
        const Watched here(watcher_);
        device_->copy_out(host, device, nbytes, stream);
    }
    void gather(std::span<const moeinf::GatherPart> parts, moeinf::Stream stream) override {
        const Watched here(watcher_);
        device_->gather(parts, stream);
    }

private:
    struct Watched {
        explicit Watched(DeviceWatcher& the_watcher) : watcher(the_watcher) {
            watcher.call_begins();
        }
        ~Watched() { watcher.call_ends(); }
        Watched(const Watched&) = delete;
        Watched& operator=(const Watched&) = delete;
        DeviceWatcher& watcher;
    };

    const std::shared_ptr<moeinf::Device> device_;
    DeviceWatcher& watcher_;
};
