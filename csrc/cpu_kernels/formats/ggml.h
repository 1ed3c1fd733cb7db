// The block formats of GGUF files. A row is blocks, and a block has its own scales. A decoder has,
// beside what plain.h names:
//
//   kBlock        true
//   Stored        the bytes of a block
//   kPack         columns of a block
//   kFirst        bytes before the codes of a block
//   kCodes        bytes of codes
//   kGroup        columns that share a scale
//   kMinima       whether a group has a minimum too, which is subtracted
//   kHalves       2 where the lower and upper codes of a byte have scales of their own, else 1
//   kTable        numbers of the lower four bits of a code; of codes of two bits, those four times
//   kBits         bits of a code in its byte
//   kHighBits     other bits of a code; those lie in 32 bytes from kHigh on, or in four bytes
//                 where there are 16 bytes of codes
//   column(b, h)  of the lower (h = 0) or upper half of byte b of the codes
//   scales<F>()   the scales and minima of a row
//
// Codes of two bits have 128 bytes of their own kind: the lower halves of 32 stored bytes, then
// their upper halves. Each holds two codes, and its other bits mean nothing.
//
// q8_0 has a byte for each code, and neither table nor halves.
#pragma once

#include <cstring>

#include "cpu_kernels/float_math.h"
#include "cpu_kernels/formats/plain.h"
#include "cpu_kernels/kernels.h"

namespace moeinf {
namespace {

template <size_t kBytes>
struct BlockOf {
    std::byte bytes[kBytes];
};

// Some rows of weights, and where their scales go. All rows are gathered before any is converted:
// a load of many numbers must wait until the stores of its parts have left the core's buffers.
template <class F>
struct ScaleJob {
    static constexpr int64_t kRow = kMaxScales + 64;  // floats; a vector may end beyond the scales
    const std::byte* w;
    int64_t stride;
    int count;
    int64_t blocks;  // in a row
    float* scales;
    float* minima;
};

// A number of each block, gathered.
template <class Block, class Number, class F>
inline void gather(const ScaleJob<F>& job, int64_t first, Number* to, int64_t row) {
    for (int n = 0; n < job.count; ++n) {
        const std::byte* from = job.w + n * job.stride + first;
        for (int64_t i = 0; i < job.blocks; ++i, from += sizeof(Block)) {
            std::memcpy(to + n * row + i, from, sizeof(Number));
        }
    }
}

// Blocks of 32 columns with one scale.
template <class Number, size_t kSize>
struct SmallBlocks {
    using Stored = BlockOf<kSize>;
    static constexpr bool kScaled = false;
    static constexpr bool kBlock = true;
    static constexpr int64_t kPack = 32;
    static constexpr int64_t kGroup = 32;
    static constexpr int64_t kFirst = sizeof(Number);
    static constexpr int64_t kCodes = kSize - sizeof(Number);
    static constexpr bool kMinima = false;
    static constexpr int kBits = 4;
    static constexpr int kHighBits = 0;
    static constexpr int kHalves = 1;
    static constexpr int64_t column(int64_t byte, int64_t half) { return byte + 16 * half; }
    template <class F>
    static void numbers(const ScaleJob<F>& job, int64_t first, float* to) {
        if constexpr (requires(typename F::Words blocks) { F::firsts(blocks, Number{}); }) {
            constexpr int64_t kTogether = F::kLanes / 4;
            for (int64_t n = 0; n < job.count; ++n) {
                const std::byte* from = job.w + n * job.stride + first;
                float* at = to + n * ScaleJob<F>::kRow;
                int64_t i = 0;
                for (; i + kTogether <= job.blocks; i += kTogether, from += kTogether * kSize) {
                    F::store(at + i, F::firsts(F::load_quarters(from, kSize), Number{}));
                }
                if (i == job.blocks) continue;
                F::store(at + i,
                         F::firsts(F::load_quarters_first(from, kSize, job.blocks - i), Number{}));
            }
            return;
        }
        Number numbers[kScaleOutputs * ScaleJob<F>::kRow];
        gather<Stored>(job, first, numbers, ScaleJob<F>::kRow);
        for (int64_t n = 0; n < job.count; ++n) {
            const int64_t row = n * ScaleJob<F>::kRow;
            widen_row<F>(numbers + row, job.blocks, to + row);
        }
    }
    template <class F>
    static void scales(const ScaleJob<F>& job) {
        numbers(job, 0, job.scales);
    }
};

struct Q80Weights : SmallBlocks<F16, 34> {
    static constexpr std::string_view kName = "q8_0";
};

struct Q40Weights : SmallBlocks<F16, 18> {
    static constexpr std::string_view kName = "q4_0";
    static constexpr float kTable[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
};

struct Iq4NlWeights : SmallBlocks<F16, 18> {
    static constexpr std::string_view kName = "iq4_nl";
    static constexpr float kTable[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                         1,    13,   25,  38,  53,  69,  89,  113};
};

struct Mxfp4Weights : SmallBlocks<E8M0, 17> {
    static constexpr std::string_view kName = "mxfp4";
    static constexpr float kTable[16] = {0,     0.5f,  1,  1.5f,  2,  3,  4,  6,
                                         -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
};

// The second number of each block, which is added, and not subtracted as a minimum is.
template <class Base>
struct Added : Base {
    static constexpr bool kMinima = true;
    template <class F>
    static void scales(const ScaleJob<F>& job) {
        Base::numbers(job, 0, job.scales);
        Base::numbers(job, 2, job.minima);
        for (int64_t n = 0; n < job.count; ++n) {
            float* minima = job.minima + n * ScaleJob<F>::kRow;
            for (int64_t i = 0; i < job.blocks; ++i) minima[i] = -minima[i];
        }
    }
};

struct Q41Weights : Added<SmallBlocks<F16, 20>> {
    static constexpr std::string_view kName = "q4_1";
    static constexpr int64_t kFirst = 4;
    static constexpr int64_t kCodes = 16;
    static constexpr float kTable[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};

// The same with a fifth bit for each code: bit j + 16h of four bytes belongs to byte j, half h.
template <size_t kSize>
struct FiveBits : SmallBlocks<F16, kSize> {
    static constexpr int64_t kFirst = kSize - 16;
    static constexpr int64_t kCodes = 16;
    static constexpr int64_t kHigh = kSize - 20;
    static constexpr int kHighBits = 1;
    static constexpr int kHalfShift = 4;
    static constexpr float kTable[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};

struct Q50Weights : FiveBits<22> {
    static constexpr std::string_view kName = "q5_0";
    static constexpr float kHighTable[16] = {-16, 0, -16, 0, -16, 0, -16, 0,
                                             -16, 0, -16, 0, -16, 0, -16, 0};
};

struct Q51Weights : Added<FiveBits<24>> {
    static constexpr std::string_view kName = "q5_1";
    static constexpr float kHighTable[16] = {0, 16, 0, 16, 0, 16, 0, 16,
                                             0, 16, 0, 16, 0, 16, 0, 16};
};

// Blocks of 256 columns. The scales of their groups are whole numbers, times a float.
template <size_t kSize>
struct LargeBlocks {
    using Stored = BlockOf<kSize>;
    static constexpr bool kScaled = false;
    static constexpr bool kBlock = true;
    static constexpr int kBits = 4;
    static constexpr int kHalves = 2;
    static constexpr int64_t kPack = 256;
    static constexpr int64_t kCodes = 128;
    static constexpr float kTable[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};

// Calls scales(block, place) for every block; `place` is that of its scales.
template <class D, class F, class Scales>
[[gnu::always_inline]] inline void for_each_block(const ScaleJob<F>& job, const Scales& scales) {
    for (int64_t n = 0; n < job.count; ++n) {
        const std::byte* block = job.w + n * job.stride;
        int64_t place = n * ScaleJob<F>::kRow;
        for (int64_t i = 0; i < job.blocks; ++i) {
            scales(block, place);
            block += sizeof(typename D::Stored);
            place += D::kPack / D::kGroup;
        }
    }
}

// to[i] = whole[i] times the float16 at `half`, for 16 numbers.
template <class F>
[[gnu::always_inline]] inline void times_half(const int8_t* whole, const std::byte* half,
                                              float* to) {
    F16 factor;
    std::memcpy(&factor, half, sizeof factor);
    for (int64_t i = 0; i < 16; i += F::kLanes) {
        F::store(to + i, F::mul(F::load(whole + i), F::splat(factor)));
    }
}

// Eight groups of 32 columns with scales of six bits, 32 added: the upper two bits in two bytes,
// the lower four in the next four bytes.
struct Iq4XsWeights : LargeBlocks<136> {
    static constexpr std::string_view kName = "iq4_xs";
    static constexpr int64_t kFirst = 8;
    static constexpr int64_t kGroup = 32;
    static constexpr int kHalves = 1;
    static constexpr int kHighBits = 0;
    static constexpr bool kMinima = false;
    static constexpr const float (&kTable)[16] = Iq4NlWeights::kTable;
    static constexpr int64_t column(int64_t byte, int64_t half) {
        return 32 * (byte / 16) + byte % 16 + 16 * half;
    }
    static void whole_scales(const std::byte* block, int8_t* to) {
        uint16_t high;
        std::memcpy(&high, block + 2, sizeof high);
        for (int g = 0; g < 8; ++g) {
            const auto low = static_cast<int>(block[4 + g / 2]) >> 4 * (g % 2) & 15;
            to[g] = static_cast<int8_t>((low | (high >> 2 * g & 3) << 4) - 32);
        }
    }
    template <class F>
    static void scales(const ScaleJob<F>& job) {
        for_each_block<Iq4XsWeights>(job, [&](const std::byte* block, int64_t place) {
            int8_t whole[16] = {};
            whole_scales(block, whole);
            times_half<F>(whole, block, job.scales + place);
        });
    }
};

// Codes of two bits in 64 bytes, in 16 groups of 16 columns.
template <size_t kSize>
struct TwoBits : LargeBlocks<kSize> {
    static constexpr int kBits = 2;
    static constexpr int64_t kGroup = 16;
    static constexpr int64_t code_byte(int64_t byte) { return byte / 64 * 32 + byte % 32; }
    static constexpr int code_shift(int64_t byte) { return static_cast<int>(byte / 32 % 2 * 4); }
    static constexpr int64_t column(int64_t byte, int64_t half) {
        return 64 * (byte / 32) + byte % 32 + 32 * half;
    }
};

// Scales in the lower halves of 16 bytes, minima in their upper halves.
struct Q2KWeights : TwoBits<84> {
    static constexpr std::string_view kName = "q2_k";
    static constexpr int64_t kFirst = 16;
    static constexpr int kHighBits = 0;
    static constexpr bool kMinima = true;
    static constexpr float kTable[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    template <class F>
    static void scales(const ScaleJob<F>& job) {
        for_each_block<Q2KWeights>(job, [&](const std::byte* block, int64_t place) {
            uint64_t in[2];
            std::memcpy(in, block, sizeof in);
            for (const bool upper : {false, true}) {
                uint64_t halves[2];
                for (int i = 0; i < 2; ++i) halves[i] = in[i] >> 4 * upper & 0x0f0f0f0f0f0f0f0f;
                int8_t whole[16];
                std::memcpy(whole, halves, sizeof whole);
                times_half<F>(whole, block + (upper ? 82 : 80),
                              (upper ? job.minima : job.scales) + place);
            }
        });
    }
};

// A third bit: bit g of byte j belongs to column 32g + j. Scales of six bits, 32 added: the lower
// four bits of scales j and j + 8 in byte j of eight, the upper two of scales j, j + 4, ... in byte
// j of the next four.
struct Q3KWeights : TwoBits<110> {
    static constexpr std::string_view kName = "q3_k";
    static constexpr int64_t kFirst = 32;
    static constexpr int64_t kHigh = 0;
    static constexpr int kHighBits = 1;
    static constexpr int kHalfShift = 1;
    static constexpr bool kMinima = false;
    static constexpr int64_t high_byte(int64_t byte) { return byte % 32; }
    static constexpr int high_shift(int64_t byte) { return static_cast<int>(2 * (byte / 32)); }
    static constexpr float kTable[16] = {-4, -3, -2, -1, -4, -3, -2, -1,
                                         -4, -3, -2, -1, -4, -3, -2, -1};
    static constexpr float kHighTable[16] = {0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4};
    static void whole_scales(const std::byte* block, int8_t* to) {
        for (int g = 0; g < 16; ++g) {
            const auto low = static_cast<int>(block[96 + g % 8]) >> 4 * (g / 8) & 15;
            const auto high = static_cast<int>(block[104 + g % 4]) >> 2 * (g / 4) & 3;
            to[g] = static_cast<int8_t>((low | high << 4) - 32);
        }
    }
    template <class F>
    static void scales(const ScaleJob<F>& job) {
        for_each_block<Q3KWeights>(job, [&](const std::byte* block, int64_t place) {
            int8_t whole[16];
            whole_scales(block, whole);
            times_half<F>(whole, block + 108, job.scales + place);
        });
    }
};

// Eight groups with scales and minima of six bits in 12 bytes, behind two float16. In three words
// of 32 bits, those of the first four groups are the lower bits of the first word and of the
// second. Of the last four groups, the lower four bits are in the third word, and the upper two
// above the bits of the first four. F::six_bits takes them apart for some blocks.
template <size_t kSize>
struct SixBitScales : LargeBlocks<kSize> {
    static constexpr int64_t kGroup = 32;
    static constexpr bool kMinima = true;
    static constexpr int64_t column(int64_t byte, int64_t half) {
        return 64 * (byte / 32) + byte % 32 + 32 * half;
    }
    template <class F>
    static void scales(const ScaleJob<F>& job) {
        for (int64_t n = 0; n < job.count; ++n) {
            const std::byte* from = job.w + n * job.stride;
            float* scales = job.scales + n * ScaleJob<F>::kRow;
            float* minima = job.minima + n * ScaleJob<F>::kRow;
            int64_t left = job.blocks;
            constexpr int64_t kTogether = F::kLanes / 4;
            for (; left >= kTogether; left -= kTogether, from += kTogether * kSize) {
                together<F>(F::load_quarters(from, kSize), scales, minima);
                scales += 2 * F::kLanes;
                minima += 2 * F::kLanes;
            }
            if (left > 0) together<F>(F::load_quarters_first(from, kSize, left), scales, minima);
        }
    }
    // Of the blocks of which a vector holds the first 16 bytes.
    template <class F>
    [[gnu::always_inline]] static void together(typename F::Words blocks, float* scales,
                                                float* minima) {
        int8_t whole[2][2 * F::kLanes];
        F::six_bits(blocks, whole[0], whole[1]);
        float factors[F::kLanes];
        F::store(factors, F::first_halves(blocks));
        const auto part = [&](const int8_t* from, int64_t second, float* to) {
            for (int64_t i = 0; i < 2 * F::kLanes; i += F::kLanes) {
                int32_t factor[F::kLanes];
                for (int64_t l = 0; l < F::kLanes; ++l) {
                    factor[l] = static_cast<int32_t>((i + l) / 8 * 2 + second);
                }
                F::store(to + i, F::mul(F::load(from + i), F::spread(factors, F::lanes(factor))));
            }
        };
        part(whole[0], 0, scales);
        part(whole[1], 1, minima);
    }
};

struct Q4KWeights : SixBitScales<144> {
    static constexpr std::string_view kName = "q4_k";
    static constexpr int64_t kFirst = 16;
    static constexpr int kHighBits = 0;
};

// Bit 2c + h of byte j of the high bits belongs to byte 32c + j of the codes, half h.
struct Q5KWeights : SixBitScales<176> {
    static constexpr std::string_view kName = "q5_k";
    static constexpr int64_t kFirst = 48;
    static constexpr int64_t kHigh = 16;
    static constexpr int kHighBits = 1;
    static constexpr int kHalfShift = 1;
    static constexpr int64_t high_byte(int64_t byte) { return byte % 32; }
    static constexpr int high_shift(int64_t byte) { return static_cast<int>(2 * (byte / 32)); }
    static constexpr float kHighTable[16] = {0, 16, 0, 16, 0, 16, 0, 16,
                                             0, 16, 0, 16, 0, 16, 0, 16};
};

// Two bits from bit 2c + 4h of byte 32n + j belong to byte 64n + 32c + j of the codes, half h.
struct Q6KWeights : LargeBlocks<210> {
    static constexpr std::string_view kName = "q6_k";
    static constexpr int64_t kFirst = 0;
    static constexpr int64_t kGroup = 16;
    static constexpr bool kMinima = false;
    static constexpr int64_t kHigh = 128;
    static constexpr int kHighBits = 2;
    static constexpr int kHalfShift = 4;
    static constexpr int64_t high_byte(int64_t byte) { return 32 * (byte / 64) + byte % 32; }
    static constexpr int high_shift(int64_t byte) { return static_cast<int>(byte / 32 % 2 * 2); }
    static constexpr float kHighTable[16] = {-32, -16, 0, 16, -32, -16, 0, 16,
                                             -32, -16, 0, 16, -32, -16, 0, 16};
    static constexpr int64_t column(int64_t byte, int64_t half) {
        return 128 * (byte / 64) + byte % 64 + 64 * half;
    }
    template <class F>
    static void scales(const ScaleJob<F>& job) {
        for_each_block<Q6KWeights>(job, [&](const std::byte* block, int64_t place) {
            times_half<F>(reinterpret_cast<const int8_t*>(block + 192), block + 208,
                          job.scales + place);
        });
    }
};

}  // namespace
}  // namespace moeinf
