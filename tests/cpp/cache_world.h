// Experts on disk with known bytes, and the question of all cache tests: does this slot hold this
// expert?
#pragma once

#include <cstring>
#include <filesystem>
#include <memory>
#include <vector>

#include "cache/expert_cache.h"
#include "id_list.h"
#include "scratch.h"

// Two segments per expert, at odd offsets. Experts of odd in-layer id lie in a second file, which
// can be cut short and healed while a cache reads it.
struct CacheWorld {
    struct Shape {
        uint64_t slot_bytes;
        uint64_t sizes[2];
        uint64_t places[2];
    };
    static constexpr Shape kUsual{12288, {5001, 2503}, {0, 8200}};
    static constexpr Shape kSmall{4096, {501, 203}, {0, 600}};  // for many steps
    static constexpr uint64_t kSlotBytes = kUsual.slot_bytes;

    int32_t layers, experts;
    ScratchFolder folder;
    std::vector<std::byte> contents[2];
    std::string paths[2];
    std::filesystem::file_time_type written;
    std::vector<moeinf::Extent> extents;
    std::shared_ptr<const moeinf::Catalog> catalog;

    CacheWorld(int32_t num_layers, int32_t num_experts, uint64_t seed, Shape shape = kUsual)
        : layers(num_layers), experts(num_experts) {
        std::mt19937_64 random(seed);
        for (auto& content : contents) content = random_bytes(13, random);
        for (int32_t expert = 0; expert < layers * experts; ++expert) {
            const auto file = static_cast<uint32_t>(expert % experts % 2);
            for (int segment = 0; segment < 2; ++segment) {
                const auto bytes = random_bytes(shape.sizes[segment], random);
                extents.push_back(
                    {file, contents[file].size(), bytes.size(), shape.places[segment]});
                contents[file].insert(contents[file].end(), bytes.begin(), bytes.end());
            }
        }
        std::vector<moeinf::CatalogFile> files;
        for (int i = 0; i < 2; ++i) {
            paths[i] = folder.write("file-" + std::to_string(i), contents[i]);
            files.push_back({paths[i], contents[i].size()});
        }
        written = std::filesystem::last_write_time(paths[1]);
        catalog = std::make_shared<const moeinf::Catalog>(moeinf::ModelShape{layers, experts},
                                                          shape.slot_bytes, files, extents);
    }

    [[nodiscard]] moeinf::ExpertCacheOptions options(int32_t slots, const std::string& policy,
                                                     std::function<void()> poll = {}) const {
        moeinf::ExpertCacheOptions options;
        options.slots = slots;
        options.policy = policy;
        options.copy.threads = 3;
        options.poll = std::move(poll);
        return options;
    }

    [[nodiscard]] moeinf::ExpertCache cache(int32_t slots, const std::string& policy) const {
        return moeinf::ExpertCache(catalog, options(slots, policy));
    }

    [[nodiscard]] bool holds(const moeinf::ExpertCache& cache, moeinf::SlotId slot, int32_t layer,
                             moeinf::ExpertIndex expert) const {
        for (size_t segment = 0; segment < 2; ++segment) {
            const moeinf::Extent& extent =
                extents[static_cast<size_t>(layer * experts + number(expert)) * 2 + segment];
            const std::byte* found = cache.pool().slot(slot) + extent.slot_offset;
            const std::byte* wanted = contents[extent.file].data() + extent.file_offset;
            // Not std::equal, which sanitizers watch byte by byte.
            if (std::memcmp(wanted, found, extent.nbytes) != 0) return false;
        }
        return true;
    }

    void cut_odd_file() const { std::filesystem::resize_file(paths[1], 5); }
    // As if nothing had happened: a file that was written to is refused, however right its bytes.
    void heal_odd_file() const {
        (void)folder.write("file-1", contents[1]);
        std::filesystem::last_write_time(paths[1], written);
    }
};
