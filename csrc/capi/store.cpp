// Stores for C: bytes in files, in the caller's memory, or written by the caller's function.
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/sizes.h"
#include "capi/border.h"
#include "capi/description.h"
#include "capi/objects.h"

namespace moeinf::capi {

Handles<moeinf_store, Store>& stores() {
    static auto* const kept = new Handles<moeinf_store, Store>("moeinf_store");
    return *kept;
}

namespace {

constexpr uint64_t kMostBytes = uint64_t{1} << 40;

// All experts one after another, each as its segments one after another.
class Segments : public ByteSource {
public:
    explicit Segments(const moeinf_store_options& options)
        : num_experts_(options.num_experts), num_segments_(options.num_segments) {
        starts_.push_back(0);
        for (int32_t i = 0; i < num_segments_; ++i) {
            starts_.push_back(starts_.back() + options.segments[i].nbytes);
        }
    }

    [[nodiscard]] uint64_t expert_bytes() const { return starts_.back(); }
    [[nodiscard]] uint64_t start(int32_t segment) const {
        return starts_[static_cast<size_t>(segment)];
    }

    void read(uint64_t offset, std::span<std::byte> out) const override {
        const auto expert = static_cast<int64_t>(offset / expert_bytes());
        const uint64_t within = offset % expert_bytes();
        const auto after = std::upper_bound(starts_.begin(), starts_.end(), within);
        const auto segment = static_cast<int32_t>(after - starts_.begin()) - 1;
        read_segment(expert, segment, within - start(segment), out);
    }

protected:
    virtual void read_segment(int64_t expert, int32_t segment, uint64_t from,
                              std::span<std::byte> out) const = 0;
    const int32_t num_experts_, num_segments_;

private:
    std::vector<uint64_t> starts_;  // of segments in an expert, and the end
};

class Memory final : public Segments {
public:
    explicit Memory(const moeinf_store_options& options) : Segments(options) {
        const int64_t count =
            int64_t{options.num_layers} * options.num_experts * options.num_segments;
        pointers_.assign(options.pointers, options.pointers + count);
        for (const void* const pointer : pointers_) check_given(pointer, "pointers to segments");
    }

private:
    void read_segment(int64_t expert, int32_t segment, uint64_t from,
                      std::span<std::byte> out) const override {
        const void* const bytes = pointers_[static_cast<size_t>(expert * num_segments_ + segment)];
        std::memcpy(out.data(), static_cast<const std::byte*>(bytes) + from, out.size());
    }
    std::vector<const void*> pointers_;
};

class Callback final : public Segments {
public:
    explicit Callback(const moeinf_store_options& options)
        : Segments(options), read_(options.read), user_(options.user) {}
    [[nodiscard]] bool whole_segments() const noexcept override { return true; }

private:
    void read_segment(int64_t expert, int32_t segment, uint64_t /*from*/,
                      std::span<std::byte> out) const override {
        const auto layer = static_cast<int32_t>(expert / num_experts_);
        const auto index = static_cast<int32_t>(expert % num_experts_);
        const int64_t written = read_(user_, layer, index, segment, out.data(), out.size());
        if (written == static_cast<int64_t>(out.size())) return;
        throw Error(ErrorCode::kRead, "layer " + std::to_string(layer) + ", expert " +
                                          std::to_string(index) + ", segment " +
                                          std::to_string(segment) + ": expected " +
                                          std::to_string(out.size()) + " bytes, read() returned " +
                                          std::to_string(written));
    }
    const moeinf_read read_;
    void* const user_;
};

void check_counts(const moeinf_store_options& options) {
    for (const int32_t count : {options.num_layers, options.num_experts, options.num_segments}) {
        if (count < 1) {
            invalid(
                "moeinf_store_options: expected at least one layer, expert and segment, found " +
                std::to_string(options.num_layers) + ", " + std::to_string(options.num_experts) +
                " and " + std::to_string(options.num_segments));
        }
    }
    check_given(options.segments, "segments");
    const int given =
        (options.places != nullptr) + (options.pointers != nullptr) + (options.read != nullptr);
    if (given != 1) {
        invalid("moeinf_store_options: expected one of places, pointers and read, found " +
                std::to_string(given));
    }
}

std::vector<CatalogFile> files_of(const moeinf_store_options& options) {
    std::vector<CatalogFile> files;
    if (options.places == nullptr) return files;
    if (options.num_paths < 1) invalid("moeinf_store_options: places without paths");
    check_given(options.paths, "paths");
    for (int32_t i = 0; i < options.num_paths; ++i) {
        check_given(options.paths[i], "a path");
        struct stat status{};
        if (stat(options.paths[i], &status) != 0) {
            throw Error(ErrorCode::kRead,
                        std::string(options.paths[i]) + ": cannot be examined: " + strerror(errno));
        }
        files.push_back({options.paths[i], static_cast<uint64_t>(status.st_size)});
    }
    return files;
}

std::shared_ptr<const Catalog> make_catalog(const moeinf_store_options& options) {
    check_counts(options);
    const ModelShape shape{options.num_layers, options.num_experts};
    const int64_t total = int64_t{options.num_layers} * options.num_experts;
    uint64_t end = 0;
    for (int32_t i = 0; i < options.num_segments; ++i) {
        const moeinf_segment& one = options.segments[i];
        if (one.nbytes == 0 || one.nbytes > kMostBytes || one.slot_offset > kMostBytes) {
            invalid("segment " + std::to_string(i) + ": expected 1 byte to 1 TiB, found " +
                    std::to_string(one.nbytes) + " at slot offset " +
                    std::to_string(one.slot_offset));
        }
        end = std::max(end, one.slot_offset + one.nbytes);
    }
    std::vector<CatalogFile> files = files_of(options);
    std::shared_ptr<const Segments> source;
    if (options.pointers != nullptr) source = std::make_shared<Memory>(options);
    if (options.read != nullptr) source = std::make_shared<Callback>(options);
    if (source != nullptr) {
        if (source->expert_bytes() > UINT64_MAX / static_cast<uint64_t>(total)) {
            invalid("moeinf_store_options: the experts have more than 2^64 bytes");
        }
        files.push_back({options.read == nullptr ? "memory" : "read()",
                         source->expert_bytes() * static_cast<uint64_t>(total), source});
    }
    std::vector<Extent> extents;
    const moeinf_place* place = options.places;
    for (int64_t expert = 0; expert < total; ++expert) {
        for (int32_t i = 0; i < options.num_segments; ++i) {
            const moeinf_segment& one = options.segments[i];
            const uint64_t offset =
                source == nullptr
                    ? place->offset
                    : static_cast<uint64_t>(expert) * source->expert_bytes() + source->start(i);
            extents.push_back(
                {source == nullptr ? place->file : 0, offset, one.nbytes, one.slot_offset});
            if (source == nullptr) ++place;
        }
    }
    return std::make_shared<const Catalog>(shape, round_up(end, kPage), std::move(files),
                                           std::move(extents));
}

}  // namespace
}  // namespace moeinf::capi

using namespace moeinf::capi;

extern "C" {

moeinf_status moeinf_store_create(const moeinf_store_options* options, moeinf_store** store) {
    return guarded([&] {
        check_given(store, "a place for the store");
        const moeinf_store_options given = read_struct(options, "moeinf_store_options");
        auto made = std::make_shared<Store>();
        made->catalog = make_catalog(given);
        if (given.expert != nullptr) made->expert = read_expert(*given.expert);
        *store = stores().add(std::move(made));
    });
}

moeinf_status moeinf_store_open(const char* description, uint32_t api_version,
                                moeinf_store** store) {
    return guarded([&] {
        check_given(store, "a place for the store");
        check_given(description, "the path of a description");
        check_version(api_version);
        *store = stores().add(std::make_shared<Store>(read_description(description)));
    });
}

moeinf_status moeinf_store_get_info(moeinf_store* store, moeinf_store_info* info) {
    return guarded([&] {
        check_head(info, "moeinf_store_info");
        const auto own = stores().get(store);
        moeinf_store_info found{};
        found.num_layers = own->catalog->num_layers();
        found.num_experts = own->catalog->num_experts();
        found.slot_bytes = own->catalog->slot_bytes();
        found.expert_bytes = own->catalog->expert_bytes();
        if (own->expert) {
            found.hidden = own->expert->hidden();
            found.intermediate = own->expert->intermediate();
        }
        write_struct(found, info);
    });
}

moeinf_status moeinf_store_destroy(moeinf_store* store) {
    return guarded([&] { (void)stores().take_unused(store); });
}
}
