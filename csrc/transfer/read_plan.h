// Turns the extents of one expert into reads: extents that lie side by side in a file become one
// range, and ranges are cut into chunks that several workers can read at once. Pure arithmetic.
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

// One read of one file: [begin, end), of which the pieces are wanted.
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

// Chunks begin and end at multiples of this inside a range, so that direct reads of neighbouring
// chunks share no block.
inline constexpr uint64_t kChunkAlignment = 4096;

// Every chunk spans at most `chunk_bytes`, a multiple of kChunkAlignment.
[[nodiscard]] ReadPlan plan_reads(std::span<const Extent> extents, size_t chunk_bytes);

}  // namespace moeinf
