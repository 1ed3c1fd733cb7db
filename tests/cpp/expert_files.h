// Experts scattered over files of random bytes, with what each slot must hold in the end.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/sizes.h"
#include "id_list.h"
#include "layout/catalog.h"
#include "scratch.h"
#include "transfer/file_reader.h"

namespace moeinf {

inline constexpr std::byte kPoison{0xA5};

struct ExpertFiles {
    ScratchFolder folder;
    std::vector<std::vector<std::byte>> contents;
    std::vector<CatalogFile> files;
    std::vector<Extent> extents;
    size_t slot_bytes = 0;
    size_t per_expert = 0;
    std::shared_ptr<const Catalog> catalog;

    // Segment sizes are drawn up to `largest`; gaps in files and slots are drawn too.
    ExpertFiles(std::mt19937_64& random, int32_t experts, size_t segments, size_t largest,
                size_t num_files) {
        per_expert = segments;
        const auto draw = [&](size_t below) { return static_cast<size_t>(random() % below); };
        std::vector<size_t> sizes(segments), places(segments);
        for (size_t i = 0; i < segments; ++i) {
            sizes[i] = 1 + draw(largest);
            slot_bytes += draw(70);
            places[i] = slot_bytes;
            slot_bytes += sizes[i];
        }
        slot_bytes += draw(kPage);
        contents.resize(num_files);
        const auto pad = [&](std::vector<std::byte>& content, size_t count) {
            const auto bytes = random_bytes(count, random);
            content.insert(content.end(), bytes.begin(), bytes.end());
        };
        for (int32_t expert = 0; expert < experts; ++expert) {
            std::vector<size_t> order(segments);
            std::iota(order.begin(), order.end(), 0);
            std::shuffle(order.begin(), order.end(), random);
            std::vector<Extent> own(segments);
            for (const size_t i : order) {
                const size_t file = draw(num_files);
                // Side by side, nearly so, or far apart.
                pad(contents[file], std::vector<size_t>{0, draw(200), draw(100'000)}[draw(3)]);
                own[i] = {static_cast<uint32_t>(file), contents[file].size(), sizes[i], places[i]};
                pad(contents[file], sizes[i]);
            }
            extents.insert(extents.end(), own.begin(), own.end());
        }
        for (size_t i = 0; i < num_files; ++i) {
            const std::string path = folder.write("file-" + std::to_string(i), contents[i]);
            files.push_back({path, contents[i].size()});
        }
        catalog =
            std::make_shared<const Catalog>(ModelShape{1, experts}, slot_bytes, files, extents);
    }

    [[nodiscard]] std::vector<std::byte> expected(ExpertId expert) const {
        std::vector<std::byte> slot(slot_bytes, kPoison);
        for (size_t i = 0; i < per_expert; ++i) {
            const Extent& extent = extents[index(expert) * per_expert + i];
            std::memcpy(slot.data() + extent.slot_offset,
                        contents[extent.file].data() + extent.file_offset, extent.nbytes);
        }
        return slot;
    }
};

inline void wait_until_finished(const ReadJobPtr& transfer) {
    while (transfer->state() <= ReadState::kRunning) std::this_thread::yield();
}

// Two experts of many chunks each, in files that take no space on the disk.
struct LargeExperts {
    static constexpr uint64_t kBytes = uint64_t{16} << 20;
    ScratchFolder folder;
    std::vector<std::byte> slots[2] = {std::vector(kBytes, kPoison), std::vector(kBytes, kPoison)};
    std::string path = folder.write("large", {});
    std::shared_ptr<const Catalog> catalog;

    LargeExperts() {
        std::filesystem::resize_file(path, 2 * kBytes);
        catalog = std::make_shared<const Catalog>(
            ModelShape{1, 2}, kBytes, std::vector<CatalogFile>{{path, 2 * kBytes}},
            std::vector<Extent>{{0, 0, kBytes, 0}, {0, kBytes, kBytes, 0}});
    }
};

}  // namespace moeinf
