#include "layout/catalog.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>

#include "base/error.h"
#include "layout/palette.h"

namespace moeinf {
namespace {

[[noreturn]] void invalid(const std::string& message) {
    throw Error(ErrorCode::kInvalid, message);
}

std::string text_of(uint64_t value) {
    return std::to_string(value);
}

// The extent that a message names. The text is made only for a message.
struct Place {
    ModelShape shape;
    ExpertId expert;
    size_t extent;

    std::string text() const {
        return "layer " + std::to_string(number(shape.layer_of(expert))) + ", expert " +
               std::to_string(number(shape.index_of(expert))) + ", extent " + text_of(extent);
    }
};

void check_in_file(const Extent& extent, const std::vector<CatalogFile>& files,
                   const Place& place) {
    if (extent.file >= files.size()) {
        invalid(place.text() + ": expected a file index below " + text_of(files.size()) +
                ", found " + text_of(extent.file));
    }
    const CatalogFile& file = files[extent.file];
    if (extent.nbytes == 0) {
        invalid(place.text() + " at offset " + text_of(extent.file_offset) + " of " + file.path +
                ": expected at least 1 byte, found 0");
    }
    if (extent.file_offset > file.nbytes || extent.nbytes > file.nbytes - extent.file_offset) {
        invalid(place.text() + ": " + text_of(extent.nbytes) + " bytes at offset " +
                text_of(extent.file_offset) + " leave the file " + file.path + ", which has " +
                text_of(file.nbytes) + " bytes");
    }
}

void check_in_slot(const Extent& extent, uint64_t slot_bytes, const std::string& path,
                   const Place& place) {
    if (extent.slot_offset > slot_bytes || extent.nbytes > slot_bytes - extent.slot_offset) {
        invalid(place.text() + " (" + path + " at offset " + text_of(extent.file_offset) + "): " +
                text_of(extent.nbytes) + " bytes at slot offset " + text_of(extent.slot_offset) +
                " leave the slot, which has " + text_of(slot_bytes) + " bytes");
    }
}

// `order` is scratch memory.
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
                    text_of(after.file_offset) + ") overlaps extent " + text_of(order[i - 1]) +
                    " in the slot: expected a slot offset of at least " + text_of(end) +
                    ", found " + text_of(after.slot_offset));
        }
    }
}

void check_palette(const NumberCheck& rows, uint64_t slot_bytes) {
    const bool inside =
        rows.slot_offset <= slot_bytes && rows.nbytes <= slot_bytes - rows.slot_offset;
    if (!inside || rows.tail < 4 || rows.tail % 4 != 0 || rows.step <= rows.tail ||
        (rows.step - rows.tail) % kPaletteBytes != 0 || rows.nbytes % rows.step != 0) {
        invalid("check of " + text_of(rows.nbytes) + " bytes at slot offset " +
                text_of(rows.slot_offset) +
                ": expected whole rows of bf16 in 12 bits in a slot of " + text_of(slot_bytes) +
                " bytes, found rows of " + text_of(rows.step) + " bytes with a tail of " +
                text_of(rows.tail));
    }
}

bool comes_first(const CatalogTensor& left, const CatalogTensor& right) {
    return left.file != right.file ? left.file < right.file : left.file_offset < right.file_offset;
}

}  // namespace

Catalog::Catalog(ModelShape shape, uint64_t slot_bytes, std::vector<CatalogFile> files,
                 std::vector<Extent> extents, std::vector<Transpose> transposes,
                 std::vector<NumberCheck> checks, std::vector<CatalogTensor> tensors,
                 std::vector<Recode> recodes)
    : shape_(shape),
      slot_bytes_(slot_bytes),
      files_(std::move(files)),
      extents_(std::move(extents)),
      transposes_(std::move(transposes)),
      checks_(std::move(checks)),
      recodes_(std::move(recodes)),
      tensors_(std::move(tensors)) {
    std::sort(tensors_.begin(), tensors_.end(), comes_first);
    const auto [num_layers, num_experts] = shape;
    if (num_layers <= 0 || num_experts <= 0 ||
        num_experts > std::numeric_limits<int32_t>::max() / num_layers) {
        invalid(
            "a catalog needs at least one layer and one expert, and at most 2^31 - 1 experts; "
            "found " +
            std::to_string(num_layers) + " layers of " + std::to_string(num_experts) + " experts");
    }
    const size_t total = static_cast<size_t>(total_experts());
    if (extents_.empty() || extents_.size() % total != 0) {
        invalid("expected the same number of extents, at least one, for each of " + text_of(total) +
                " experts; found " + text_of(extents_.size()) + " extents");
    }
    extents_per_expert_ = extents_.size() / total;
    for (const CatalogFile& file : files_) {
        if (file.source != nullptr && file.source->whole_segments()) may_cut_ = false;
        uint32_t taken = 1;  // a bit for each place
        for (const CatalogCopy& copy : file.copies) {
            const uint32_t bit = copy.place < kMaxPlaces ? uint32_t{1} << copy.place : 0;
            if (bit == 0 || (taken & bit) != 0) {
                invalid(copy.path + ": expected a place from 1 to " + text_of(kMaxPlaces - 1) +
                        ", once for each file, found " + text_of(copy.place));
            }
            taken |= bit;
            num_places_ = std::max(num_places_, copy.place + 1);
        }
    }

    uint64_t end = 0;  // of the one before
    for (const Transpose& one : transposes_) {
        const bool known = one.element == 1 || one.element == 2 || one.element == 4;
        const uint64_t most = known ? slot_bytes / one.element : 0;
        if (one.rows == 0 || one.cols == 0 || one.rows > most || one.cols > most / one.rows ||
            one.slot_offset > slot_bytes - one.nbytes() || one.slot_offset % one.element != 0 ||
            one.slot_offset < end) {
            invalid("transpose of " + text_of(one.rows) + " x " + text_of(one.cols) +
                    " elements of " + text_of(one.element) + " bytes at slot offset " +
                    text_of(one.slot_offset) + ": expected elements of 1, 2 or 4 bytes in a slot " +
                    "of " + text_of(slot_bytes) + " bytes, from " + text_of(end) + " on");
        }
        end = one.slot_offset + one.nbytes();
    }
    for (const Recode& one : recodes_) {
        const bool words = one.kind != Recode::Kind::kSigns;
        if (one.rows == 0 || one.cols == 0 || (one.bits != 4 && one.bits != 8) ||
            one.rows > slot_bytes || one.cols > slot_bytes / one.rows * 2 ||
            one.slot_offset > slot_bytes || one.nbytes() > slot_bytes - one.slot_offset ||
            (words && (one.slot_offset % 4 != 0 || one.rows * one.bits % 32 != 0)) ||
            (one.kind == Recode::Kind::kAwq && (one.cols % 8 != 0 || one.bits != 4))) {
            invalid("recode of " + text_of(one.rows) + " x " + text_of(one.cols) + " integers of " +
                    text_of(one.bits) + " bits at slot offset " + text_of(one.slot_offset) +
                    ": expected whole words in a slot of " + text_of(slot_bytes) + " bytes");
        }
    }
    uint64_t unit = 1;
    for (const NumberCheck& check : checks_) {
        if (check.tail != 0) {
            check_palette(check, slot_bytes);
            cuts_numbers_ = true;
            continue;
        }
        unit = std::max(unit, static_cast<uint64_t>(scale_bytes(check.type)));
        if (check.slot_offset > slot_bytes || check.nbytes > slot_bytes - check.slot_offset ||
            check.step < static_cast<uint64_t>(scale_bytes(check.type)) ||
            check.nbytes % static_cast<uint64_t>(scale_bytes(check.type)) != 0) {
            invalid("check of " + text_of(check.nbytes) + " bytes at slot offset " +
                    text_of(check.slot_offset) + ": expected whole numbers in a slot of " +
                    text_of(slot_bytes) + " bytes");
        }
        for (const Transpose& one : transposes_) {
            if (one.slot_offset < check.slot_offset + check.nbytes &&
                check.slot_offset < one.slot_offset + one.nbytes()) {
                cuts_numbers_ = true;
            }
        }
    }
    std::vector<size_t> order;
    for (const ExpertId expert : shape.experts()) {
        const std::span<const Extent> own = this->extents(expert);
        uint64_t nbytes = 0;
        Place place{shape, expert, 0};
        for (size_t i = 0; i < own.size(); ++i) {
            place.extent = i;
            check_in_file(own[i], files_, place);
            check_in_slot(own[i], slot_bytes_, files_[own[i].file].path, place);
            nbytes += own[i].nbytes;
            cuts_numbers_ = cuts_numbers_ || own[i].file_offset % unit != 0;
        }
        check_overlap(own, files_, order, place);
        if (expert == ExpertId{0}) expert_bytes_ = nbytes;
        if (nbytes != expert_bytes_) {
            place.extent = 0;
            invalid(place.text() + " (" + files_[own[0].file].path + " at offset " +
                    text_of(own[0].file_offset) + "): expected an expert of " +
                    text_of(expert_bytes_) + " bytes like the first, found " + text_of(nbytes));
        }
    }
}

std::span<const Extent> Catalog::extents(ExpertId expert) const {
    if (!is_some(expert) || number(expert) >= total_experts()) {
        invalid("expected a flat expert id from 0 to " + std::to_string(total_experts() - 1) +
                ", found " + std::to_string(number(expert)));
    }
    return {extents_.data() + index(expert) * extents_per_expert_, extents_per_expert_};
}

std::pair<std::string, uint64_t> Catalog::origin(ExpertId expert, uint64_t slot_offset) const {
    for (const Extent& extent : extents(expert)) {
        if (slot_offset < extent.slot_offset || slot_offset - extent.slot_offset >= extent.nbytes) {
            continue;
        }
        const uint64_t at = extent.file_offset + (slot_offset - extent.slot_offset);
        const std::string& path = files_[extent.file].path;
        const auto after = std::upper_bound(tensors_.begin(), tensors_.end(),
                                            CatalogTensor{extent.file, at, {}}, comes_first);
        if (after == tensors_.begin() || std::prev(after)->file != extent.file) {
            return {path, at};
        }
        const CatalogTensor& tensor = *std::prev(after);
        return {path + ": " + tensor.name, at - tensor.file_offset};
    }
    return {"slot", slot_offset};
}

}  // namespace moeinf
