// The products of packed matrices on the matrix unit of x86. The sums of the columns that share a
// scale are multiplied by it and added in 32-bit floats:
//
//   y[r][n] = multiplier * sum over groups of scale * (sum over the group of x[r][k] * w[n][k])
//
// Where a group has a minimum, it is subtracted times the sum of the group's x. Zero points are
// subtracted from the integers, which leaves integers that are exact in bf16.
//
// A panel is 32 outputs by 256 columns. It is decoded once, and multiplied by up to 64 activations:
// a pair of tiles, 32 of them, at a time. The vector unit decodes the rows of the next panel while
// the matrix unit multiplies this one.
//
//   sums of a group, in tile registers --ended--> `ended`, two groups --scaled--> `acc` --> y
//         ^            |
//         +-- `open` <-+ where the panel ends before the group
//
// Where the weights are multiplied by their scales as they are decoded (Folded codes), all columns
// are one group without a scale. Its sums stay `open`, and are added to `acc` at the end. A panel
// with scales that do not allow it is decoded anew, without them.
#include "cpu_kernels/packed_panel.h"

namespace moeinf {
namespace {

constexpr int64_t kPairRows = 2 * kTileRows;
constexpr int64_t kPairs = 2;
constexpr int64_t kNoEnd = int64_t{1} << 40;  // columns

// Four tiles of sums: by 16 outputs and 16 activations.
struct alignas(64) Sums {
    float of[4][kTileRows * kTileRows];
};

// Two tiles of activations.
struct Pair {
    const std::byte* x[2];  // as KernelSet::arrange_tiles writes them
    int64_t rows[2];        // how many they are; the second may be none
};

// What a thread computes with: it fits in the first two levels of its caches.
struct Work {
    Panel panels[2];
    Sums ended[2];
    Sums open[kPairs];
    // A store to a place 4096 bytes before a load delays it.
    alignas(64) std::byte apart[2048];
    Sums acc[kPairs];
};

// acc += sums of kGroups groups times their scales, from the panel's group `first` on.
template <int kGroups, bool kMinima, bool kTwoOutputs, bool kTwoRows>
void add_groups(const Form& form, const Panel& panel, const Pair& pair, int64_t first,
                const Sums (&ended)[2], Sums& acc) {
    constexpr int kTiles = kTwoRows ? 2 : 1;
    __m512 x[kGroups][2];  // sums of the activations
    if constexpr (kMinima) {
        const int64_t tiles = (form.job.depth + kTileDepth - 1) / kTileDepth;
        const int64_t at = panel.first / kTileDepth + first;
        for (int half = 0; half < kTiles; ++half) {
            const int64_t rows = pair.rows[half];
            const std::byte* sums = pair.x[half] + tiles * kLine * rows;
            for (int g = 0; g < kGroups; ++g) {
                x[g][half] =
                    F::load_first(reinterpret_cast<const float*>(sums) + (at + g) * rows, rows);
            }
        }
    }
    for (int at = 0; at < (kTwoOutputs ? 4 : 2); at += 2) {
        const float* scales = panel.scales[at / 2 * kTileRows] + first;
        for (int m = 0; m < kTileRows; ++m, scales += kPanelScales) {
            __m512 sum[kTiles];
#pragma GCC unroll 2
            for (int half = 0; half < kTiles; ++half) {
                sum[half] = _mm512_load_ps(acc.of[at + half] + m * kTileRows);
            }
#pragma GCC unroll 2
            for (int g = 0; g < kGroups; ++g) {
                const __m512 scale = _mm512_set1_ps(scales[g]);
#pragma GCC unroll 2
                for (int half = 0; half < kTiles; ++half) {
                    const __m512 of_group = _mm512_load_ps(ended[g].of[at + half] + m * kTileRows);
                    sum[half] = _mm512_fmadd_ps(scale, of_group, sum[half]);
                    if constexpr (kMinima) {
                        sum[half] = _mm512_fnmadd_ps(_mm512_set1_ps(scales[g + form.minima]),
                                                     x[g][half], sum[half]);
                    }
                }
            }
#pragma GCC unroll 2
            for (int half = 0; half < kTiles; ++half) {
                _mm512_store_ps(acc.of[at + half] + m * kTileRows, sum[half]);
            }
        }
    }
}

// A panel by a pair of tiles.
template <bool kMinima, bool kTwoOutputs, bool kTwoRows>
void multiply(const Form& form, const Panel& panel, const Pair& pair, Decoding& next,
              Sums (&ended)[2], Sums& open, Sums& acc) {
    int64_t added = 0;  // groups
    int waiting = 0;    // ended groups that are not added
    const auto add = [&] {
        written();
        const auto groups = [&]<int kGroups>() {
            add_groups<kGroups, kMinima, kTwoOutputs, kTwoRows>(form, panel, pair, added, ended,
                                                                acc);
        };
        if (waiting == 2) groups.template operator()<2>();
        if (waiting == 1) groups.template operator()<1>();
        added += waiting;
        waiting = 0;
    };
    const int64_t end = panel.first + panel.columns;
    const int64_t group = panel.folded ? kNoEnd : form.group;
    int64_t begins = panel.first / group * group;  // the next group's first column
    if (begins == panel.first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, open.of[0], kLine);
        if constexpr (kTwoRows) _tile_loadd(1, open.of[1], kLine);
        if constexpr (kTwoOutputs) _tile_loadd(2, open.of[2], kLine);
        if constexpr (kTwoOutputs && kTwoRows) _tile_loadd(3, open.of[3], kLine);
    }
    begins += group;
    for (int64_t k = panel.first; k < end; k += form.step) {
        const std::byte* weights =
            panel.weights[(k - panel.first) / kTileDepth][0] + 2 * (k % kTileDepth);
        const bool fresh = k == begins;
        Sums& full = ended[waiting];
        const int64_t first = 4 * pair.rows[0];
        _tile_loadd(4, weights, kLine);
        _tile_loadd(6, pair.x[0] + k / 2 * first, first);
        if (fresh) {
            _tile_stored(0, full.of[0], kLine);
            _tile_zero(0);
        }
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kTwoRows) {
            const int64_t second = 4 * pair.rows[1];
            _tile_loadd(7, pair.x[1] + k / 2 * second, second);
            if (fresh) {
                _tile_stored(1, full.of[1], kLine);
                _tile_zero(1);
            }
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kTwoOutputs) {
            _tile_loadd(5, weights + kTileBytes, kLine);
            if (fresh) {
                _tile_stored(2, full.of[2], kLine);
                _tile_zero(2);
            }
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (kTwoOutputs && kTwoRows) {
            if (fresh) {
                _tile_stored(3, full.of[3], kLine);
                _tile_zero(3);
            }
            _tile_dpbf16ps(3, 5, 7);
        }
        next.some();
        if (fresh) {
            begins += group;
            if (++waiting == 2) add();
        }
    }
    const bool ends = !panel.folded && (end == begins || end == form.job.depth);
    Sums& last = ends ? ended[waiting++] : open;
    _tile_stored(0, last.of[0], kLine);
    if constexpr (kTwoRows) _tile_stored(1, last.of[1], kLine);
    if constexpr (kTwoOutputs) _tile_stored(2, last.of[2], kLine);
    if constexpr (kTwoOutputs && kTwoRows) _tile_stored(3, last.of[3], kLine);
    add();
}

using Multiply = void (*)(const Form& form, const Panel& panel, const Pair& pair, Decoding& next,
                          Sums (&ended)[2], Sums& open, Sums& acc);

template <bool kMinima>
Multiply multiply_of(bool two_outputs, bool two_rows) {
    if (two_outputs)
        return two_rows ? multiply<kMinima, true, true> : multiply<kMinima, true, false>;
    return two_rows ? multiply<kMinima, false, true> : multiply<kMinima, false, false>;
}

void write_pair(const Form& form, const Pair& pair, int64_t outputs, const Sums& open, Sums& acc,
                float* y) {
    const DotJob& job = form.job;
    const __m512 multiplier = _mm512_set1_ps(job.multiplier);
    written();
    for (int at = 0; at < 4; ++at) {
        const int64_t row = at % 2 * kTileRows;
        const int64_t output = at / 2 * kTileRows;
        if (output >= outputs || pair.rows[at % 2] == 0) continue;
        float* sums = acc.of[at];
        for (int i = 0; i < kTileRows * kTileRows; i += kTileRows) {
            __m512 sum = _mm512_load_ps(sums + i);
            if (form.folded) sum = _mm512_add_ps(sum, _mm512_load_ps(open.of[at] + i));
            _mm512_store_ps(sums + i, _mm512_mul_ps(sum, multiplier));
        }
        write(sums, pair.rows[at % 2], outputs - output, y + row * job.y_stride + output,
              job.y_stride);
    }
}

// All outputs by some pairs of tiles.
void multiply_pairs(const Form& form, std::span<const Pair> pairs, DecodeRow row, DecodeRow plain,
                    float* y, Work& work) {
    const DotJob& job = form.job;
    place(form, 0, 0, work.panels[0]);
    Decoding{form, work.panels[0], row, plain, work.panels[0].outputs}.rest();
    for (int64_t turn = 0, output = 0; output < job.outputs; ++turn) {
        const Panel& panel = work.panels[turn % 2];
        Panel& ahead = work.panels[(turn + 1) % 2];
        const bool last = panel.first + panel.columns == job.depth;
        const int64_t next = last ? output + kOutputs : output;
        Decoding decoding{form, ahead, row, plain};
        if (next < job.outputs) {
            place(form, next, last ? 0 : panel.first + kPanelDepth, ahead);
            const auto steps =
                static_cast<int64_t>(pairs.size()) * ((panel.columns + form.step - 1) / form.step);
            decoding.rows = ahead.outputs;
            decoding.share = (ahead.outputs + steps - 1) / steps;
        }
        if (panel.first == 0) {
            std::memset(work.acc, 0, pairs.size() * sizeof work.acc[0]);
            std::memset(work.open, 0, pairs.size() * sizeof work.open[0]);
        }
        written();
        for (size_t i = 0; i < pairs.size(); ++i) {
            const bool two_outputs = panel.outputs > kTileRows;
            const bool two_rows = pairs[i].rows[1] > 0;
            const Multiply function = form.minima != 0 ? multiply_of<true>(two_outputs, two_rows)
                                                       : multiply_of<false>(two_outputs, two_rows);
            function(form, panel, pairs[i], decoding, work.ended, work.open[i], work.acc[i]);
        }
        decoding.rest();
        if (last) {
            for (size_t i = 0; i < pairs.size(); ++i) {
                write_pair(form, pairs[i], panel.outputs, work.open[i], work.acc[i],
                           y + static_cast<int64_t>(i) * kPairRows * job.y_stride + output);
            }
        }
        output = next;
    }
}

template <class Codes>
void dot(const DotJob& job) {
    Form form{
        .job = job,
        .group = 0,
        .step = kTileDepth,
        .folded = false,
        .minima = 0,
        .bytes = Codes::kBytes,
    };
    if constexpr (requires { Codes::kGroup; }) {
        form.group = Codes::kGroup;
        form.minima = Codes::kMinima;
    } else {
        form.group = job.how == nullptr ? 0 : job.how->block_cols;
        if (form.group == 0) form.group = std::max(job.depth, kTileDepth);  // one group
    }
    if constexpr (requires { Codes::kFolded; }) {
        form.group = Codes::kFolded;
        form.folded = true;
    }
    form.step = form.folded ? kTileDepth : std::min(form.group, kTileDepth);
    Work work;
    std::memset(work.ended, 0, sizeof work.ended);
    configure(kTileRows, kTileRows, form.step);
    for (int64_t row = 0; row < job.rows; row += kPairs * kPairRows) {
        Pair pairs[kPairs];
        size_t count = 0;
        for (int64_t at = row; at < job.rows && count < kPairs; at += kPairRows) {
            Pair& pair = pairs[count++];
            for (int64_t half = 0; half < 2; ++half) {
                const int64_t tile = at / kTileRows + half;
                pair.rows[half] = std::clamp<int64_t>(job.rows - tile * kTileRows, 0, kTileRows);
                pair.x[half] =
                    pair.rows[half] == 0 ? nullptr : static_cast<const std::byte*>(job.x[tile]);
            }
        }
        DecodeRow plain = nullptr;
        if constexpr (requires { typename Codes::Plain; }) plain = decode<typename Codes::Plain>;
        multiply_pairs(form, {pairs, count}, decode<Codes>, plain, job.y + row * job.y_stride,
                       work);
    }
    _tile_release();
}

template <class Codes>
bool is_folded(const DotJob& job, ScaleType type) {
    return job.how != nullptr && job.how->type == type && job.how->block_cols == Codes::kFolded;
}

template <class Codes>
void with_or_without_zeros(const DotJob& job) {
    if (job.zeros == nullptr) return dot<Codes>(job);
    dot<typename Codes::Zeroed>(job);
}

}  // namespace

void amx_e4m3(const DotJob& job) {
    is_folded<Mxfp8Codes>(job, ScaleType::kE8M0) ? dot<Mxfp8Codes>(job) : dot<E4M3Codes>(job);
}
void amx_e2m1(const DotJob& job) {
    if (is_folded<Nvfp4Codes>(job, ScaleType::kE4M3)) return dot<Nvfp4Codes>(job);
    is_folded<Mxfp4Codes>(job, ScaleType::kE8M0) ? dot<Mxfp4Codes>(job) : dot<E2M1Codes>(job);
}
void amx_int8(const DotJob& job) {
    with_or_without_zeros<Int8Codes>(job);
}
void amx_int4(const DotJob& job) {
    with_or_without_zeros<Int4Codes>(job);
}
void amx_q8_0(const DotJob& job) {
    dot<Q80Codes>(job);
}
void amx_q4_0(const DotJob& job) {
    dot<SmallBlockCodes<Q40Weights>>(job);
}
void amx_q4_1(const DotJob& job) {
    dot<SmallBlockCodes<Q41Weights>>(job);
}
void amx_q5_0(const DotJob& job) {
    dot<SmallBlockCodes<Q50Weights>>(job);
}
void amx_q5_1(const DotJob& job) {
    dot<SmallBlockCodes<Q51Weights>>(job);
}
void amx_iq4_nl(const DotJob& job) {
    dot<SmallBlockCodes<Iq4NlWeights>>(job);
}
void amx_mxfp4(const DotJob& job) {
    dot<GgufMxfp4Codes>(job);
}
void amx_iq4_xs(const DotJob& job) {
    dot<Iq4XsCodes>(job);
}
void amx_q3_k(const DotJob& job) {
    dot<Q3KCodes>(job);
}
void amx_q4_k(const DotJob& job) {
    dot<LargeBlockCodes<Q4KWeights>>(job);
}
void amx_q5_k(const DotJob& job) {
    dot<LargeBlockCodes<Q5KWeights>>(job);
}
void amx_q6_k(const DotJob& job) {
    dot<Q6KCodes>(job);
}

}  // namespace moeinf
