// The place of every expert's bytes: ranges of files, and where in a slot each range belongs. Built
// once when a store is opened, then shared and never changed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/ids.h"
#include "layout/byte_source.h"
#include "layout/matrix.h"

namespace moeinf {

// One range of a file and the place in a slot where it belongs.
struct Extent {
    bool operator==(const Extent&) const = default;
    uint32_t file;         // index into Catalog::files()
    uint64_t file_offset;  // bytes from the start of the file
    uint64_t nbytes;
    uint64_t slot_offset;  // bytes from the start of the slot
};

// Bytes of every slot that files hold the other way round: read as `rows` x `cols` elements of
// `element` bytes, they lie in the slot as `cols` x `rows`.
struct Transpose {
    bool operator==(const Transpose&) const = default;
    uint64_t slot_offset;
    uint64_t rows;
    uint64_t cols;
    uint64_t element;  // 1, 2 or 4

    [[nodiscard]] uint64_t nbytes() const noexcept { return rows * cols * element; }
};

// Integers of every slot that files hold in another code. They are written again where they lie,
// once an expert is there in full and its matrices are turned. `bits` are those of a stored
// integer.
struct Recode {
    enum class Kind : uint8_t {
        kSigns,     // rows x cols bytes, stored with 128 added
        kAwq,       // for each 8 rows, `cols` words of 8 integers: one of each row, see kAwqOrder
        kZeros,     // rows x cols bytes, of words [rows * bits / 32, cols]: the rows of a column
        kAwqZeros,  // the same, the rows of a word in the order of AWQ
    };
    bool operator==(const Recode&) const = default;
    Kind kind;
    uint64_t slot_offset;
    uint64_t rows;
    uint64_t cols;
    uint64_t bits = 4;  // 4 or 8; kAwq has 4
    uint64_t plus = 0;  // added to zero points, without carry

    // In the slot, after it was written again.
    [[nodiscard]] uint64_t nbytes() const noexcept {
        return kind == Kind::kAwq ? rows * cols / 2 : rows * cols;
    }
};

// Bytes of every slot that are numbers of one type, none of which may be NaN or infinite.
// `negative`: numbers below zero are allowed.
struct NumberCheck {
    bool operator==(const NumberCheck&) const = default;
    uint64_t slot_offset;
    uint64_t nbytes;
    ScaleType type;
    bool negative;
    uint64_t step;  // bytes from one number to the next
    // Else the bytes are rows of bf16 in 12 bits (layout/palette.h), `step` bytes each, with such a
    // tail. They must be well formed.
    uint64_t tail = 0;
    // Else they are zero points of integers of four bits: bytes from -8 to 7.
    bool zero_points = false;
};

// The same bytes as those of a file, in another place. The files themselves lie in place 0.
struct CatalogCopy {
    bool operator==(const CatalogCopy&) const = default;
    uint32_t place;  // 1 to kMaxPlaces - 1, once in a file
    std::string path;
    std::shared_ptr<const ByteSource> source{};
};

struct CatalogFile {
    bool operator==(const CatalogFile&) const = default;
    std::string path;
    uint64_t nbytes;
    std::shared_ptr<const ByteSource> source{};  // in place of a file of that path
    std::vector<CatalogCopy> copies{};
};

// Where a tensor begins, for messages.
struct CatalogTensor {
    bool operator==(const CatalogTensor&) const = default;
    uint32_t file;
    uint64_t file_offset;
    std::string name;
};

class Catalog {
public:
    static constexpr uint32_t kMaxPlaces = 16;

    // `extents` holds `extents_per_expert` entries for each flat expert id (layer * num_experts +
    // expert), in order. Throws Error(kInvalid) if an extent exceeds its file or its slot, if two
    // extents of one expert overlap in the slot, if a transpose, a check or a recode exceeds the
    // slot, if transposes overlap or are out of order, or if a copy has no place of its own.
    // `tensors` are what messages name; they may be none, or not all.
    Catalog(ModelShape shape, uint64_t slot_bytes, std::vector<CatalogFile> files,
            std::vector<Extent> extents, std::vector<Transpose> transposes = {},
            std::vector<NumberCheck> checks = {}, std::vector<CatalogTensor> tensors = {},
            std::vector<Recode> recodes = {});

    [[nodiscard]] ModelShape shape() const noexcept { return shape_; }
    [[nodiscard]] int32_t num_layers() const noexcept { return shape_.num_layers; }
    [[nodiscard]] int32_t num_experts() const noexcept { return shape_.num_experts; }  // per layer
    [[nodiscard]] int32_t total_experts() const noexcept { return shape_.total(); }
    [[nodiscard]] uint64_t slot_bytes() const noexcept { return slot_bytes_; }
    [[nodiscard]] const std::vector<CatalogFile>& files() const noexcept { return files_; }
    [[nodiscard]] uint32_t num_places() const noexcept { return num_places_; }  // 1: no copies
    [[nodiscard]] std::span<const Extent> extents(ExpertId expert) const;
    [[nodiscard]] const std::vector<Transpose>& transposes() const noexcept { return transposes_; }
    // False if a source wants to be asked for whole segments.
    [[nodiscard]] bool may_cut() const noexcept { return may_cut_; }
    [[nodiscard]] const std::vector<NumberCheck>& checks() const noexcept { return checks_; }
    [[nodiscard]] const std::vector<Recode>& recodes() const noexcept { return recodes_; }
    // Whether numbers can be checked only once an expert is there in full: they are turned, or a
    // block of a file may end inside one, because some extent begins at an odd place.
    [[nodiscard]] bool cuts_numbers() const noexcept { return cuts_numbers_; }
    // "file: tensor", or the file, of the byte that an expert has at `slot_offset`; and how many
    // bytes of the tensor, or of the file, come before it.
    [[nodiscard]] std::pair<std::string, uint64_t> origin(ExpertId expert,
                                                          uint64_t slot_offset) const;
    // The sum of the extents of any one expert.
    [[nodiscard]] uint64_t expert_bytes() const noexcept { return expert_bytes_; }

    // The same bytes of the same files, at the same places in a slot?
    bool operator==(const Catalog&) const = default;

private:
    ModelShape shape_;
    uint64_t slot_bytes_;
    uint64_t expert_bytes_ = 0;
    size_t extents_per_expert_ = 0;
    bool may_cut_ = true;
    uint32_t num_places_ = 1;
    std::vector<CatalogFile> files_;
    std::vector<Extent> extents_;
    std::vector<Transpose> transposes_;
    std::vector<NumberCheck> checks_;
    std::vector<Recode> recodes_;
    bool cuts_numbers_ = false;
    std::vector<CatalogTensor> tensors_;  // by file, then by offset
};

}  // namespace moeinf
