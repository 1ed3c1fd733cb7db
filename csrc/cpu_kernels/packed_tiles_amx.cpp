// The products of packed matrices on the matrix unit of x86. 32 columns of a row are decoded into
// bf16, without loss, where a tile of weights is loaded from. The sums of the columns that share a
// scale are multiplied by it and added in 32-bit floats:
//
//   y[r][n] = multiplier * sum over groups of scale * (sum over the group of x[r][k] * w[n][k])
//
// and where a group has a minimum, it is subtracted times the sum of the group's x.
#include <memory>

#include "cpu_kernels/dot_scaled.h"
#include "cpu_kernels/formats/decoders.h"
#include "cpu_kernels/tiles_amx.h"

namespace moeinf {
namespace {

using F = Floats512;
using Scaling = ScaleJob<F>;

constexpr int64_t kOutputs = 2 * kTileRows;
constexpr int64_t kRowScales = Scaling::kRow;

// 16 numbers as bf16, twice, so that the fifth bit of an index does not matter.
template <class Decoder>
__m512i table() {
    const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(Decoder::kTable));
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

__m512i to_bf16(__m512 first, __m512 second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// Each has load(row, k, n): columns k to k + n of a row as bf16, for a k of whole tiles and n
// <= 32.

// A byte for each column.
template <class Number>
struct Bytes {
    static constexpr bool kMinima = false;
    static __m512i load(const std::byte* row, int64_t k, int64_t n) {
        if constexpr (requires { F::bf16_of<0>(__m512i{}, Number{}); }) {
            const auto mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
            const __m256i bytes = _mm256_maskz_loadu_epi8(mask, row + k);
            return F::bf16_of<0>(_mm512_cvtepu8_epi16(bytes), Number{});
        }
        const auto* from = reinterpret_cast<const Number*>(row) + k;
        if (n == kTileDepth) return to_bf16(F::load(from), F::load(from + 16));
        return to_bf16(F::load_first(from, std::min<int64_t>(n, 16)),
                       n > 16 ? F::load_first(from + 16, n - 16) : F::splat(0.0f));
    }
};

// Two columns in a byte, the first one in its lower half.
template <class Decoder>
struct Nibbles {
    static constexpr bool kMinima = false;
    static __m512i load(const std::byte* row, int64_t k, int64_t n) {
        const auto mask = static_cast<__mmask16>((1u << (n / 2)) - 1u);
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, row + k / 2));
        const __m512i codes = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
        return _mm512_permutexvar_epi16(codes, table<Decoder>());
    }
};

struct Q80Codes {
    using Decoder = Q80Weights;
    static constexpr bool kMinima = false;
    static __m512i load(const std::byte* row, int64_t k, int64_t /*n*/) {
        const std::byte* block = row + k / 32 * static_cast<int64_t>(sizeof(Q80Weights::Stored));
        return Bytes<int8_t>::load(block + Q80Weights::kFirst, 0, kTileDepth);
    }
};

// Blocks of 32 columns: the first 16 in the lower halves of 16 bytes.
template <class D>
struct BlockNibbles {
    using Decoder = D;
    static constexpr bool kMinima = false;
    static __m512i load(const std::byte* row, int64_t k, int64_t /*n*/) {
        const std::byte* block = row + k / 32 * static_cast<int64_t>(sizeof(typename D::Stored));
        const __m256i bytes = _mm256_cvtepu8_epi16(F::bytes(block + D::kFirst));
        const __m512i codes =
            _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
        return _mm512_permutexvar_epi16(codes, table<D>());
    }
};

// Blocks of 256 columns: 64 at a time, the first 32 in the lower halves of 32 bytes.
struct Q4KCodes {
    using Decoder = Q4KWeights;
    static constexpr bool kMinima = true;
    static __m512i load(const std::byte* row, int64_t k, int64_t /*n*/) {
        const std::byte* block = row + k / 256 * static_cast<int64_t>(sizeof(Q4KWeights::Stored));
        const std::byte* from = block + Q4KWeights::kFirst + k % 256 / 64 * 32;
        const __m512i bytes =
            _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        const __m512i codes = k % 64 == 0 ? bytes : _mm512_srli_epi16(bytes, 4);
        return _mm512_permutexvar_epi16(codes, table<Q4KWeights>());
    }
};

// Scales and minima of the rows of a block of outputs, and the sums of the activations of each
// group.
struct Kept {
    alignas(64) float scales[kOutputs * kRowScales];
    alignas(64) float minima[kOutputs * kRowScales];
    alignas(64) float sums[kMaxScales][2][kTileRows];
};

// Kept between calls. All formats share it, and a thread that computes no tiles has none: it is
// nearly a megabyte.
Kept& kept_by_this_thread() {
    static thread_local std::unique_ptr<Kept> kept;
    if (kept == nullptr) kept = std::make_unique<Kept>();
    return *kept;
}

template <class Codes>
void load_scales(const DotJob& job, int64_t output, int64_t count, Kept& kept) {
    if constexpr (requires { typename Codes::Decoder; }) {
        using Decoder = typename Codes::Decoder;
        for (int64_t n = 0; n < count; n += kScaleOutputs) {
            Decoder::template scales<F>(
                {.w = job.w + (output + n) * job.w_stride,
                 .stride = job.w_stride,
                 .count = static_cast<int>(std::min<int64_t>(kScaleOutputs, count - n)),
                 .blocks = job.depth / Decoder::kPack,
                 .scales = kept.scales + n * kRowScales,
                 .minima = kept.minima + n * kRowScales});
        }
    } else {
        for (int64_t n = 0; n < count; ++n) {
            float* to = kept.scales + n * kRowScales;
            *to = 1;
            if (job.how == nullptr) continue;
            const int64_t row = (job.first + output + n) / job.how->block_rows;
            widen_scales<F>(job.scales + row * job.how->rows.stride, job.how->type,
                            job.how->count(job.depth), to);
        }
    }
}

template <class Codes>
int64_t group_of(const DotJob& job) {
    if constexpr (requires { typename Codes::Decoder; }) {
        return Codes::Decoder::kGroup;
    } else {
        if (job.how != nullptr && job.how->block_cols != 0) return job.how->block_cols;
        return std::max(job.depth, kTileDepth);  // one group
    }
}

// Of both tiles of activations, for each tile of depth.
void sum_activations(const DotJob& job, const std::byte* const (&x)[2], const int64_t (&rows)[2],
                     Kept& kept) {
    for (int half = 0; half < 2; ++half) {
        const auto mask = static_cast<__mmask16>((1u << rows[half]) - 1u);
        const std::byte* from = x[half];
        for (int64_t k = 0; k < job.depth; k += kTileDepth) {
            __m512 sum = F::splat(0.0f);
            for (int i = 0; i < kTileRows && rows[half] > 0; ++i, from += 4 * rows[half]) {
                const __m512i pairs = _mm512_maskz_loadu_epi32(mask, from);
                const __m512i second = _mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000));
                sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
                sum = _mm512_add_ps(sum, _mm512_castsi512_ps(second));
            }
            _mm512_store_ps(kept.sums[k / kTileDepth][half], sum);
        }
    }
}

struct Block {
    int64_t outputs;  // 1 to 32
    bool two_outputs, two_rows;
    alignas(
        64) std::byte weights[2][2][kTileBytes];  // by half of a group's columns, and of outputs
    alignas(64) float tile[4][kTileRows * kTileRows];
    alignas(64) float acc[4][kTileRows * kTileRows];
};

// Adds the sums of a group to those of the block.
template <class Codes>
void add_group(Block& block, const Kept& kept, int64_t group) {
    _tile_stored(0, block.tile[0], kLine);
    if (block.two_rows) _tile_stored(1, block.tile[1], kLine);
    if (block.two_outputs) _tile_stored(2, block.tile[2], kLine);
    if (block.two_outputs && block.two_rows) _tile_stored(3, block.tile[3], kLine);
    for (int at = 0; at < 4; ++at) {
        if ((at % 2 == 1 && !block.two_rows) || (at / 2 == 1 && !block.two_outputs)) continue;
        const int64_t first = at / 2 * kTileRows * kRowScales + group;
        for (int m = 0; m < kTileRows; ++m) {
            float* acc = block.acc[at] + m * kTileRows;
            __m512 sum = _mm512_load_ps(acc);
            sum = _mm512_fmadd_ps(_mm512_load_ps(block.tile[at] + m * kTileRows),
                                  _mm512_set1_ps(kept.scales[first + m * kRowScales]), sum);
            if constexpr (Codes::kMinima) {
                sum = _mm512_fnmadd_ps(_mm512_set1_ps(kept.minima[first + m * kRowScales]),
                                       _mm512_load_ps(kept.sums[group][at % 2]), sum);
            }
            _mm512_store_ps(acc, sum);
        }
    }
}

// Decodes 32 columns of all rows; of groups of 16, each half with zeros for the other.
template <class Codes>
void decode(const DotJob& job, const std::byte* w, int64_t k, bool halves, Block& block) {
    const int64_t columns = std::min(kTileDepth, job.depth - k);
    for (int64_t n = 0; n < block.outputs; ++n, w += job.w_stride) {
        const __m512i weights = Codes::load(w, k, columns);
        std::byte* to = block.weights[0][n / kTileRows] + n % kTileRows * kLine;
        if (!halves) {
            _mm512_store_si512(to, weights);
            continue;
        }
        _mm512_store_si512(to, _mm512_maskz_mov_epi32(0x00ff, weights));
        _mm512_store_si512(to + sizeof block.weights[0], _mm512_maskz_mov_epi32(0xff00, weights));
    }
    written();
}

// The sums of a step: the tiles of weights by those of activations.
void multiply_tiles(const Block& block, const std::byte* const (&weights)[2],
                    const std::byte* const (&x)[2], const int64_t (&rows)[2]) {
    _tile_loadd(4, weights[0], kLine);
    if (block.two_outputs) _tile_loadd(5, weights[1], kLine);
    _tile_loadd(6, x[0], 4 * rows[0]);
    _tile_dpbf16ps(0, 4, 6);
    if (block.two_outputs) _tile_dpbf16ps(2, 5, 6);
    if (!block.two_rows) return;
    _tile_loadd(7, x[1], 4 * rows[1]);
    _tile_dpbf16ps(1, 4, 7);
    if (block.two_outputs) _tile_dpbf16ps(3, 5, 7);
}

// All groups of up to 32 outputs by up to 32 activations.
template <class Codes>
void walk_groups(const DotJob& job, const std::byte* w, const std::byte* const (&x)[2],
                 const int64_t (&rows)[2], Kept& kept, Block& block) {
    const int64_t group = group_of<Codes>(job);
    const bool halves = group < kTileDepth;
    int64_t done = 0;  // groups
    for (int64_t k = 0; k < job.depth; k += kTileDepth) {
        decode<Codes>(job, w, k, halves, block);
        const std::byte* at[2] = {x[0] + 2 * k * rows[0], x[1] + 2 * k * rows[1]};
        for (int half = 0; half < (halves ? 2 : 1); ++half) {
            const int64_t begin = k + half * group;
            if (halves && begin >= job.depth) break;
            if (halves || k % group == 0) {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            multiply_tiles(block, {block.weights[half][0], block.weights[half][1]}, at, rows);
            const int64_t next = k + kTileDepth;
            if (halves || next % group == 0 || next >= job.depth) {
                add_group<Codes>(block, kept, done++);
            }
        }
    }
}

void write_block(const DotJob& job, Block& block, const int64_t (&rows)[2], float* y) {
    const __m512 multiplier = _mm512_set1_ps(job.multiplier);
    for (int at = 0; at < 4; ++at) {
        const int64_t row = at % 2 * kTileRows;
        const int64_t output = at / 2 * kTileRows;
        if (output >= block.outputs || rows[at % 2] == 0) continue;
        float* acc = block.acc[at];
        for (int i = 0; i < kTileRows * kTileRows; i += kTileRows) {
            _mm512_store_ps(acc + i, _mm512_mul_ps(_mm512_load_ps(acc + i), multiplier));
        }
        write(acc, rows[at % 2], block.outputs - output, y + row * job.y_stride + output,
              job.y_stride);
    }
}

template <class Codes>
void dot(const DotJob& job) {
    Kept& kept = kept_by_this_thread();
    Block block{};
    for (int64_t row = 0; row < job.rows; row += 2 * kTileRows) {
        const int64_t first = std::min(kTileRows, job.rows - row);
        const int64_t rows[2] = {first, std::min(kTileRows, job.rows - row - first)};
        const auto* x = reinterpret_cast<const std::byte* const*>(job.x) + row / kTileRows;
        const std::byte* tiles[2] = {x[0], rows[1] > 0 ? x[1] : x[0]};
        block.two_rows = rows[1] > 0;
        if constexpr (Codes::kMinima) sum_activations(job, tiles, rows, kept);
        configure(rows[0], rows[1]);
        for (int64_t n = 0; n < job.outputs; n += kOutputs) {
            block.outputs = std::min(kOutputs, job.outputs - n);
            block.two_outputs = block.outputs > kTileRows;
            std::memset(block.acc, 0, sizeof block.acc);
            load_scales<Codes>(job, n, block.outputs, kept);
            walk_groups<Codes>(job, job.w + n * job.w_stride, tiles, rows, kept, block);
            write_block(job, block, rows, job.y + row * job.y_stride + n);
        }
    }
    _tile_release();
}

}  // namespace

void amx_e4m3(const DotJob& job) {
    dot<Bytes<E4M3>>(job);
}
void amx_e2m1(const DotJob& job) {
    dot<Nibbles<E2M1Weights>>(job);
}
void amx_int8(const DotJob& job) {
    dot<Bytes<int8_t>>(job);
}
void amx_int4(const DotJob& job) {
    dot<Nibbles<Int4Weights>>(job);
}
void amx_q8_0(const DotJob& job) {
    dot<Q80Codes>(job);
}
void amx_q4_0(const DotJob& job) {
    dot<BlockNibbles<Q40Weights>>(job);
}
void amx_iq4_nl(const DotJob& job) {
    dot<BlockNibbles<Iq4NlWeights>>(job);
}
void amx_mxfp4(const DotJob& job) {
    dot<BlockNibbles<Mxfp4Weights>>(job);
}
void amx_q4_k(const DotJob& job) {
    dot<Q4KCodes>(job);
}

}  // namespace moeinf
