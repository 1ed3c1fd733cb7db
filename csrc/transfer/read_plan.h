// Turns the extents of one expert into reads. Extents that lie side by side in a file become one
// range. Ranges are cut into chunks that several workers can read at the same time. Only
// arithmetic, no IO.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "layout/catalog.h"

namespace moeinf {

// Bytes of a chunk that belong together in the slot.
struct Piece {
    uint64_t file_offset;
    uint64_t nbytes;
    uint64_t slot_offset;
};

// One read of one file: [begin, end). Only the bytes of the pieces are kept.
struct Chunk {
    uint32_t file;
    uint64_t begin;
    uint64_t end;
    size_t first_piece;
    size_t num_pieces;
};

struct ReadPlan {
    std::vector<Chunk> chunks;
    std::vector<Piece> pieces;  // by chunk, then by file offset

    [[nodiscard]] std::span<const Piece> pieces_of(const Chunk& chunk) const noexcept {
        return {pieces.data() + chunk.first_piece, chunk.num_pieces};
    }
};

// Inside a range chunks begin and end at multiples of this, so direct reads of neighbouring chunks
// share no block.
inline constexpr uint64_t kChunkAlignment = 4096;

// Every chunk spans at most `chunk_bytes`, a multiple of kChunkAlignment.
[[nodiscard]] ReadPlan plan_reads(std::span<const Extent> extents, size_t chunk_bytes);

}  // namespace moeinf
