#include "transfer/recode.h"

#include <cstdint>
#include <cstring>

namespace moeinf {
namespace {

void change_signs(std::byte* bytes, uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) bytes[i] ^= std::byte{0x80};
}

// Exchanges 4-bit integer j of word i and integer i of word j, in three steps: halves, quarters and
// eighths of the 8 x 8 integers.
void turn_integers(uint32_t (&words)[8]) {
    constexpr uint32_t kMasks[3] = {0x0000ffff, 0x00ff00ff, 0x0f0f0f0f};
    for (int step = 0; step < 3; ++step) {
        const int distance = 4 >> step;
        const int shift = 4 * distance;
        for (int i = 0; i < 8; ++i) {
            if ((i & distance) != 0) continue;
            uint32_t& low = words[i];
            uint32_t& high = words[i + distance];
            const uint32_t moved = ((low >> shift) ^ high) & kMasks[step];
            high ^= moved;
            low ^= moved << shift;
        }
    }
}

// Eight rows of integers, of `cols` words with one integer of each row.
void split_rows(uint32_t* words, uint64_t cols, std::vector<uint32_t>& scratch) {
    scratch.assign(words, words + cols);
    for (uint64_t k = 0; k < cols / 8; ++k) {
        uint32_t eight[8];
        std::memcpy(eight, scratch.data() + 8 * k, sizeof eight);
        turn_integers(eight);
        for (int i = 0; i < 8; ++i) {
            words[static_cast<uint64_t>(kAwqOrder[i]) * (cols / 8) + k] = eight[i];
        }
    }
}

// The middle of the unsigned integers becomes zero, as in the weights.
void spread_zeros(const Recode& one, std::byte* bytes, std::vector<uint32_t>& scratch) {
    const uint64_t each = 32 / one.bits;
    scratch.resize(one.rows / each * one.cols);
    std::memcpy(scratch.data(), bytes, scratch.size() * sizeof(uint32_t));
    const uint32_t mask = (1u << one.bits) - 1;
    for (uint64_t block = 0; block < one.rows / each; ++block) {
        for (uint64_t i = 0; i < each; ++i) {
            const uint64_t place =
                one.kind == Recode::Kind::kAwqZeros ? static_cast<uint64_t>(kAwqOrder[i]) : i;
            const uint32_t* const words = scratch.data() + block * one.cols;
            std::byte* const to = bytes + (block * each + place) * one.cols;
            for (uint64_t group = 0; group < one.cols; ++group) {
                const uint32_t code = words[group] >> (i * one.bits);
                const uint32_t zero =
                    ((code + static_cast<uint32_t>(one.plus)) & mask) - (1u << (one.bits - 1));
                to[group] = static_cast<std::byte>(zero & 0xff);
            }
        }
    }
}

}  // namespace

void recode(std::span<const Recode> recodes, std::byte* slot, std::vector<uint32_t>& scratch) {
    for (const Recode& one : recodes) {
        std::byte* const bytes = slot + one.slot_offset;
        switch (one.kind) {
            case Recode::Kind::kSigns:
                change_signs(bytes, one.nbytes());
                break;
            case Recode::Kind::kAwq:
                for (uint64_t row = 0; row < one.rows; row += 8) {
                    split_rows(reinterpret_cast<uint32_t*>(bytes + row * one.cols / 2), one.cols,
                               scratch);
                }
                break;
            case Recode::Kind::kZeros:
            case Recode::Kind::kAwqZeros:
                spread_zeros(one, bytes, scratch);
                break;
        }
    }
}

}  // namespace moeinf
