#include "layout/catalog.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/error.h"

namespace moeinf {
namespace {

[[noreturn]] void invalid(const std::string& message) {
    throw Error(ErrorCode::kInvalid, message);
}

std::string number(uint64_t value) {
    return std::to_string(value);
}

// Which extent a message is about; spelled out only when there is a message.
struct Place {
    size_t flat;
    size_t num_experts;
    size_t extent;

    std::string text() const {
        return "layer " + number(flat / num_experts) + ", expert " + number(flat % num_experts) +
               ", extent " + number(extent);
    }
};

void check_in_file(const Extent& extent, const std::vector<CatalogFile>& files,
                   const Place& place) {
    if (extent.file >= files.size()) {
        invalid(place.text() + ": expected a file index below " + number(files.size()) +
                ", found " + number(extent.file));
    }
    const CatalogFile& file = files[extent.file];
    if (extent.nbytes == 0) {
        invalid(place.text() + " at offset " + number(extent.file_offset) + " of " + file.path +
                ": expected at least 1 byte, found 0");
    }
    if (extent.file_offset > file.nbytes || extent.nbytes > file.nbytes - extent.file_offset) {
        invalid(place.text() + ": " + number(extent.nbytes) + " bytes at offset " +
                number(extent.file_offset) + " leave the file " + file.path + ", which has " +
                number(file.nbytes) + " bytes");
    }
}

void check_in_slot(const Extent& extent, uint64_t slot_bytes, const std::string& path,
                   const Place& place) {
    if (extent.slot_offset > slot_bytes || extent.nbytes > slot_bytes - extent.slot_offset) {
        invalid(place.text() + " (" + path + " at offset " + number(extent.file_offset) + "): " +
                number(extent.nbytes) + " bytes at slot offset " + number(extent.slot_offset) +
                " leave the slot, which has " + number(slot_bytes) + " bytes");
    }
}

// `order` is scratch.
void check_overlap(std::span<const Extent> extents, const std::vector<CatalogFile>& files,
                   std::vector<size_t>& order, Place place) {
    order.resize(extents.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::sort(order.begin(), order.end(), [&](size_t left, size_t right) {
        return extents[left].slot_offset < extents[right].slot_offset;
    });
    for (size_t i = 1; i < order.size(); ++i) {
        const Extent& before = extents[order[i - 1]];
        const Extent& after = extents[order[i]];
        const uint64_t end = before.slot_offset + before.nbytes;
        if (end > after.slot_offset) {
            place.extent = order[i];
            invalid(place.text() + " (" + files[after.file].path + " at offset " +
                    number(after.file_offset) + ") overlaps extent " + number(order[i - 1]) +
                    " in the slot: expected a slot offset of at least " + number(end) + ", found " +
                    number(after.slot_offset));
        }
    }
}

}  // namespace

Catalog::Catalog(int32_t num_layers, int32_t num_experts, uint64_t slot_bytes,
                 std::vector<CatalogFile> files, std::vector<Extent> extents)
    : num_layers_(num_layers),
      num_experts_(num_experts),
      slot_bytes_(slot_bytes),
      files_(std::move(files)),
      extents_(std::move(extents)) {
    if (num_layers <= 0 || num_experts <= 0 ||
        num_experts > std::numeric_limits<int32_t>::max() / num_layers) {
        invalid(
            "a catalog needs at least one layer and one expert, and at most 2^31 - 1 experts; "
            "found " +
            std::to_string(num_layers) + " layers of " + std::to_string(num_experts) + " experts");
    }
    const size_t total = static_cast<size_t>(total_experts());
    if (extents_.empty() || extents_.size() % total != 0) {
        invalid("expected the same number of extents, at least one, for each of " + number(total) +
                " experts; found " + number(extents_.size()) + " extents");
    }
    extents_per_expert_ = extents_.size() / total;

    std::vector<size_t> order;
    for (size_t flat = 0; flat < total; ++flat) {
        const std::span<const Extent> own = this->extents(static_cast<int32_t>(flat));
        uint64_t nbytes = 0;
        Place place{flat, static_cast<size_t>(num_experts_), 0};
        for (size_t i = 0; i < own.size(); ++i) {
            place.extent = i;
            check_in_file(own[i], files_, place);
            check_in_slot(own[i], slot_bytes_, files_[own[i].file].path, place);
            nbytes += own[i].nbytes;
        }
        check_overlap(own, files_, order, place);
        if (flat == 0) expert_bytes_ = nbytes;
        if (nbytes != expert_bytes_) {
            place.extent = 0;
            invalid(place.text() + " (" + files_[own[0].file].path + " at offset " +
                    number(own[0].file_offset) + "): expected an expert of " +
                    number(expert_bytes_) + " bytes like the first, found " + number(nbytes));
        }
    }
}

std::span<const Extent> Catalog::extents(int32_t flat_expert) const {
    if (flat_expert < 0 || flat_expert >= total_experts()) {
        invalid("expected a flat expert id from 0 to " + std::to_string(total_experts() - 1) +
                ", found " + std::to_string(flat_expert));
    }
    return {extents_.data() + static_cast<size_t>(flat_expert) * extents_per_expert_,
            extents_per_expert_};
}

}  // namespace moeinf
