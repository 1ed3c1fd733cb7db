// The thread pool and the expert FFN where sanitizers can see them: every task runs once, callers
// on several threads take turns, slots of exactly their segments' size are never read beyond, the
// bits do not depend on threads or waves, and weights with scales are summed block by block.
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "compute/expert_ffn.h"
#include "cpu_kernels/formats/formats.h"
#include "probe/memory_read.h"

using namespace moeinf;

namespace {

void every_task_runs_exactly_once() {
    for (const int threads : {1, 2, 3, 8}) {
        ThreadPool pool(threads);
        CHECK_EQ(pool.threads(), threads);
        for (const int tasks : {0, 1, 2, 7, 100, 1000}) {
            for (int round = 0; round < 20; ++round) {
                std::vector<int> runs(static_cast<size_t>(tasks), 0);
                pool.run(tasks, [&](int64_t i) noexcept { ++runs[static_cast<size_t>(i)]; });
                for (const int count : runs) CHECK_EQ(count, 1);
            }
        }
    }
}

// A thread that is late for one region meets the beginning of the next, which has another size.
void no_late_thread_takes_a_task_of_the_next_region(uint32_t seed) {
    std::mt19937 random(seed);
    for (const int threads : {2, 3, 8}) {
        ThreadPool pool(threads);
        std::vector<std::atomic<int>> runs(64);
        for (int round = 0; round < 200000; ++round) {
            const auto tasks = static_cast<int64_t>(2 + random() % 62);
            for (std::atomic<int>& one : runs) one.store(0, std::memory_order_relaxed);
            pool.run(tasks, [&](int64_t i) noexcept { ++runs[static_cast<size_t>(i)]; });
            for (int64_t i = 0; i < 64; ++i) {
                CHECK_EQ(runs[static_cast<size_t>(i)].load(), i < tasks ? 1 : 0);
            }
        }
    }
}

void callers_on_several_threads_take_turns() {
    ThreadPool pool(3);
    std::atomic<int64_t> total{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
        callers.emplace_back([&] {
            for (int round = 0; round < 200; ++round) {
                int64_t sums[9] = {};
                pool.run(9, [&](int64_t i) noexcept { sums[i] = i; });
                for (const int64_t sum : sums) total += sum;
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    CHECK_EQ(total.load(), int64_t{4} * 200 * 36);
}

void a_pool_wakes_from_sleep() {
    ThreadPool pool(2);
    for (int round = 0; round < 5; ++round) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        std::atomic<int> runs{0};
        pool.run(2, [&](int64_t) noexcept { ++runs; });
        CHECK_EQ(runs.load(), 2);
    }
}

// A gated silu layer in 32-bit floats. Each slot is its own allocation without a byte to spare.
struct Layer {
    int64_t hidden, intermediate, tokens, top_k;
    int32_t experts = 5;
    std::vector<std::vector<float>> slots;
    std::vector<float> x, scale;
    std::vector<int64_t> ids;

    Layer(int64_t h, int64_t i, int64_t t, int64_t k, uint32_t seed)
        : hidden(h), intermediate(i), tokens(t), top_k(k) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        const auto fill = [&](std::vector<float>& values, int64_t count) {
            values.resize(static_cast<size_t>(count));
            for (float& value : values) value = normal(random);
        };
        slots.resize(static_cast<size_t>(experts));
        for (auto& slot : slots) fill(slot, 3 * h * i);
        fill(x, t * h);
        fill(scale, t * k);
        for (int64_t n = 0; n < t * k; ++n) {
            ids.push_back(static_cast<int64_t>(random() % static_cast<uint32_t>(experts + 1)) - 1);
        }
    }

    [[nodiscard]] std::vector<float> run(CpuEngine& engine, bool one_by_one) const {
        const auto matrix = [](int64_t rows, int64_t cols, int64_t first) {
            const auto row = cols * static_cast<int64_t>(sizeof(float));
            return Matrix{.format = find_format("f32"),
                          .rows = rows,
                          .cols = cols,
                          .values = {static_cast<uint64_t>(first) * sizeof(float), row}};
        };
        const int64_t size = hidden * intermediate;
        const float infinity = std::numeric_limits<float>::infinity();
        const ExpertFfn expert(matrix(intermediate, hidden, 0), matrix(intermediate, hidden, size),
                               matrix(hidden, intermediate, 2 * size),
                               find_gate("glu", "silu", 1, infinity));
        ExpertFfnCall call(engine, expert,
                           {x.data(), DType::kF32, ids.data(), true, scale.data(), DType::kF32,
                            tokens, top_k, experts});
        std::vector<SlotOfExpert> ready;
        for (size_t p = 0; p < call.experts().size(); ++p) {
            const auto id = index(call.experts()[p]);
            ready.push_back(
                {static_cast<int32_t>(p), reinterpret_cast<const std::byte*>(slots[id].data())});
        }
        if (one_by_one) {
            for (size_t p = ready.size(); p-- > 0;) call.compute({&ready[p], 1});
        } else {
            call.compute(ready);
        }
        std::vector<float> out(static_cast<size_t>(tokens * hidden), NAN);
        call.finish(out.data(), DType::kF32);
        return out;
    }

    [[nodiscard]] double reference(int64_t t, int64_t h) const {
        double sum = 0;
        for (int64_t j = 0; j < top_k; ++j) {
            const int64_t id = ids[static_cast<size_t>(t * top_k + j)];
            if (id < 0) continue;
            const std::vector<float>& slot = slots[static_cast<size_t>(id)];
            double y = 0;
            for (int64_t i = 0; i < intermediate; ++i) {
                double gate = 0;
                double up = 0;
                for (int64_t k = 0; k < hidden; ++k) {
                    const double value = x[static_cast<size_t>(t * hidden + k)];
                    gate += value * slot[static_cast<size_t>(i * hidden + k)];
                    up += value * slot[static_cast<size_t>((intermediate + i) * hidden + k)];
                }
                y += gate / (1 + std::exp(-gate)) * up *
                     slot[static_cast<size_t>((2 * hidden + h) * intermediate + i)];
            }
            sum += scale[static_cast<size_t>(t * top_k + j)] * y;
        }
        return sum;
    }
};

void results_are_right_and_have_the_same_bits_however_computed(uint32_t seed) {
    const int64_t sizes[][4] = {{1, 1, 1, 1}, {7, 5, 3, 2}, {33, 50, 6, 4}, {96, 100, 70, 3}};
    for (const KernelSet* kernels : kernel_sets()) {
        if (!kernels->supported()) continue;
        CpuEngine one(1, kernels->name);
        CpuEngine many(3, kernels->name);
        for (const auto& [hidden, intermediate, tokens, top_k] : sizes) {
            const Layer layer(hidden, intermediate, tokens, top_k, seed);
            const std::vector<float> out = layer.run(one, false);
            double largest = 1;
            for (const float value : out) largest = std::max<double>(largest, std::abs(value));
            for (const int64_t t : {int64_t{0}, tokens - 1}) {
                for (int64_t h = 0; h < hidden; ++h) {
                    const float found = out[static_cast<size_t>(t * hidden + h)];
                    CHECK(std::abs(found - layer.reference(t, h)) < 1e-4 * largest);
                }
            }
            for (const bool one_by_one : {false, true}) {
                const std::vector<float> other = layer.run(many, one_by_one);
                CHECK(std::memcmp(out.data(), other.data(), out.size() * sizeof(float)) == 0);
            }
        }
    }
}

// A call of so many tokens takes the scratch memory that it was to take, and hardly less.
void tokens_per_call_fill_the_scratch_they_are_given() {
    constexpr size_t kRoom = size_t{1} << 20;
    constexpr int64_t kCols = 256;
    const std::vector<uint16_t> x(size_t{kRoom}, 0);
    const std::vector<float> weights(size_t{kRoom}, 1);
    std::vector<int64_t> ids(size_t{kRoom});
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(i % 2);
    const auto matrix = [&](const char* name) {
        const WeightFormat format = find_format(name);
        return Matrix{.format = format,
                      .rows = kCols,
                      .cols = kCols,
                      .values = {0, facts(format).row_bytes(kCols)}};
    };
    const char* names[][3] = {{"f32", "f32", "f32"},    {"bf16", "bf16", "bf16"},
                              {"int4", "int4", "int4"}, {"q4_k", "q6_k", "q2_k"},
                              {"bf16", "int8", "q4_1"}, {"palette3", "q8_0", "e2m1"}};
    for (const KernelSet* kernels : kernel_sets()) {
        if (!kernels->supported()) continue;
        for (const auto& [gate, up, down] : names) {
            const ExpertFfn expert(matrix(gate), matrix(up), matrix(down),
                                   find_gate("glu", "silu", 1, INFINITY));
            for (const DType dtype : {DType::kBF16, DType::kF32}) {
                for (const int32_t experts : {2, 4096}) {  // many tokens for each, and few
                    FfnInput input{x.data(),    dtype,        ids.data(), true,   weights.data(),
                                   DType::kF32, int64_t{512}, 2,          experts};
                    input.whole_tokens = input.tokens;
                    input.tokens = ExpertFfnCall::tokens_per_call(*kernels, expert, input, kRoom);
                    CpuEngine engine(1, kernels->name);
                    {
                        const ExpertFfnCall call(engine, expert, input);
                    }
                    CHECK(input.tokens > 1);
                    CHECK(engine.kept_scratch() <= kRoom);
                    CHECK(engine.kept_scratch() >= kRoom / 100 * 95);
                    CHECK_EQ(ExpertFfnCall::tokens_per_call(*kernels, expert, input, 1), 1);
                }
            }
        }
    }
}

// A part of the rows of a matrix, as threads take them, with rows that lie apart, each in memory
// without a byte to spare. Many activations get the bits that each gets alone.
void weights_with_scales_are_summed_block_by_block(uint32_t seed) {
    std::mt19937 random(seed);
    const auto draw = [&](int64_t from, int64_t to) {
        return std::uniform_int_distribution<int64_t>(from, to)(random);
    };
    const size_t format = static_cast<size_t>(find_format("int8"));
    for (int round = 0; round < 100; ++round) {
        const int64_t rows = draw(1, 20);
        const int64_t outputs = draw(1, 20);
        const int64_t depth = draw(1, 300);
        const int64_t first = draw(0, 10);
        const int64_t stride = depth + draw(0, 3);
        Scales how{.block_rows = 3, .block_cols = 32};
        const int64_t blocks = how.count(depth);
        how.rows.stride = blocks * 4;
        std::vector<int8_t> w(static_cast<size_t>((first + outputs - 1) * stride + depth));
        for (int8_t& value : w) value = static_cast<int8_t>(draw(-128, 127));
        std::vector<float> scales(static_cast<size_t>(((first + outputs + 2) / 3) * blocks));
        std::vector<float> x(static_cast<size_t>(rows * depth));
        for (float& value : scales) value = static_cast<float>(draw(1, 1000)) / 512;
        for (float& value : x) value = static_cast<float>(draw(-999, 999)) / 512;
        for (const KernelSet* kernels : kernel_sets()) {
            if (!kernels->supported()) continue;
            const Product& format_product = kernels->formats[format].f32;
            const int64_t padded =
                (depth + format_product.step - 1) / format_product.step * format_product.step;
            std::vector<float> arranged(static_cast<size_t>(rows * padded), NAN);
            for (int64_t r = 0; r < rows; ++r) {
                format_product.arrange(&x[static_cast<size_t>(r * depth)], depth,
                                       &arranged[static_cast<size_t>(r * padded)]);
            }
            const auto product = [&](int64_t begin, int64_t count) {
                std::vector<const void*> pointers;
                for (int64_t r = begin; r < begin + count; ++r)
                    pointers.push_back(&arranged[static_cast<size_t>(r * padded)]);
                std::vector<float> y(static_cast<size_t>(count * outputs), NAN);
                format_product.dot({.x = pointers.data(),
                                    .rows = count,
                                    .w = reinterpret_cast<const std::byte*>(&w[0] + first * stride),
                                    .w_stride = stride,
                                    .first = first,
                                    .how = &how,
                                    .scales = reinterpret_cast<const std::byte*>(scales.data()),
                                    .outputs = outputs,
                                    .depth = depth,
                                    .y = y.data(),
                                    .y_stride = outputs});
                return y;
            };
            const std::vector<float> y = product(0, rows);
            for (int64_t r = 0; r < rows; ++r) {
                const std::vector<float> alone = product(r, 1);
                for (int64_t n = 0; n < outputs; ++n) {
                    double sum = 0;
                    double size = 0;
                    for (int64_t k = 0; k < depth; ++k) {
                        const double term =
                            1.0 * x[static_cast<size_t>(r * depth + k)] *
                            w[static_cast<size_t>((first + n) * stride + k)] *
                            scales[static_cast<size_t>((first + n) / 3 * blocks + k / 32)];
                        sum += term;
                        size += std::abs(term);
                    }
                    const float found = y[static_cast<size_t>(r * outputs + n)];
                    CHECK(std::abs(found - sum) <= 1e-5 * size);
                    CHECK_EQ(found, alone[static_cast<size_t>(n)]);
                }
            }
        }
    }
}

// A part of a matrix in memory without a byte to spare, and activations in tiles of 16.
void a_matrix_unit_sums_each_output_alone(uint32_t seed) {
    std::mt19937 random(seed);
    const auto draw = [&](int64_t from, int64_t to) {
        return std::uniform_int_distribution<int64_t>(from, to)(random);
    };
    for (const KernelSet* kernels : kernel_sets()) {
        const auto tiles = kernels->formats[static_cast<size_t>(find_format("bf16"))].tiles;
        if (tiles == nullptr || !kernels->supported()) continue;
        for (int round = 0; round < 300; ++round) {
            const int64_t rows = draw(1, 70);
            const int64_t outputs = draw(1, 70);
            const int64_t depth = draw(1, 150);
            const int64_t stride = depth + draw(0, 3);
            const auto numbers = [&](int64_t count) {
                std::vector<uint16_t> values(static_cast<size_t>(count));
                for (uint16_t& value : values) {
                    const auto number = static_cast<float>(draw(-128, 128)) / 64;
                    value = static_cast<uint16_t>(std::bit_cast<uint32_t>(number) >> 16);
                }
                return values;
            };
            const auto number = [](uint16_t value) {
                return std::bit_cast<float>(uint32_t{value} << 16);
            };
            const std::vector<uint16_t> w = numbers((outputs - 1) * stride + depth);
            const std::vector<uint16_t> x = numbers(rows * depth);
            const int64_t row = tile_row_bytes(depth) / 2;
            const auto product = [&](int64_t begin, int64_t count) {
                std::vector<uint16_t> arranged(static_cast<size_t>(count * row + kTileBehind / 2),
                                               0xffff);
                std::vector<const void*> pointers;
                for (int64_t r = 0; r < count; r += kTileRows) {
                    const void* from[kTileRows];
                    const int64_t some = std::min(kTileRows, count - r);
                    for (int64_t i = 0; i < some; ++i) {
                        from[i] = &x[static_cast<size_t>((begin + r + i) * depth)];
                    }
                    uint16_t* to = &arranged[static_cast<size_t>(r * row)];
                    kernels->arrange_tiles(from, some, depth, to);
                    pointers.push_back(to);
                }
                std::vector<float> y(static_cast<size_t>(count * outputs), NAN);
                tiles({.x = pointers.data(),
                       .rows = count,
                       .w = reinterpret_cast<const std::byte*>(w.data()),
                       .w_stride = stride * 2,
                       .outputs = outputs,
                       .depth = depth,
                       .y = y.data(),
                       .y_stride = outputs,
                       .from_memory = draw(0, 1) == 1});
                return y;
            };
            const std::vector<float> y = product(0, rows);
            const int64_t r = draw(0, rows - 1);
            const std::vector<float> alone = product(r, 1);
            for (int64_t n = 0; n < outputs; ++n) {
                double sum = 0;
                double size = 0;
                for (int64_t k = 0; k < depth; ++k) {
                    const double term = 1.0 * number(x[static_cast<size_t>(r * depth + k)]) *
                                        number(w[static_cast<size_t>(n * stride + k)]);
                    sum += term;
                    size += std::abs(term);
                }
                const float found = y[static_cast<size_t>(r * outputs + n)];
                CHECK(std::abs(found - sum) <= 1e-5 * size);
                CHECK_EQ(found, alone[static_cast<size_t>(n)]);
            }
        }
    }
}

void every_format_that_is_exact_in_bf16_has_tiles() {
    for (const KernelSet* kernels : kernel_sets()) {
        if (kernels->arrange_tiles == nullptr) continue;
        for (const std::string& name : format_names()) {
            // Minima of 16 columns need sums of 16 activations, which tiles do not have.
            const bool has = name != "f16" && name != "f32" && name != "q2_k";
            const auto format = static_cast<size_t>(find_format(name));
            CHECK_EQ(kernels->formats[format].tiles != nullptr, has);
        }
    }
}

// Integers with zero points, more activations than share a panel, and groups that end inside of a
// panel, behind it, or not at all. Nothing lies behind the weights, scales and zero points.
void packed_tiles_are_the_products_of_what_is_decoded(uint32_t seed) {
    std::mt19937 random(seed);
    const auto draw = [&](int64_t from, int64_t to) {
        return std::uniform_int_distribution<int64_t>(from, to)(random);
    };
    for (const KernelSet* kernels : kernel_sets()) {
        if (kernels->arrange_tiles == nullptr || !kernels->supported()) continue;
        for (int round = 0; round < 60; ++round) {
            const bool bytes = draw(0, 1) == 0;
            const auto& format =
                kernels->formats[static_cast<size_t>(find_format(bytes ? "int8" : "int4"))];
            const int64_t groups[] = {0, 16, 32, 64, 128, 256, 384};
            Scales how{.block_rows = draw(1, 3), .block_cols = groups[draw(0, 6)]};
            const int64_t rows = draw(1, 150);
            const int64_t outputs = draw(1, 70);
            const int64_t first = draw(0, 5);
            const int64_t depth = 2 * draw(1, 500);
            const int64_t count = how.count(depth);
            const int64_t scale_rows = (first + outputs - 1) / how.block_rows + 1;
            how.rows.stride = 4 * count;
            how.zeros = Rows{0, count};
            const int64_t stride = bytes ? depth : depth / 2;
            std::vector<std::byte> w(static_cast<size_t>(outputs * stride));
            for (std::byte& byte : w) byte = static_cast<std::byte>(draw(0, 255));
            std::vector<float> scales(static_cast<size_t>(scale_rows * count));
            for (float& scale : scales) scale = static_cast<float>(draw(1, 512)) / 256;
            std::vector<int8_t> zeros(scales.size());
            const int64_t half = bytes ? 128 : 8;
            for (int8_t& zero : zeros) zero = static_cast<int8_t>(draw(-half, half - 1));
            std::vector<uint16_t> x(static_cast<size_t>(rows * depth));
            for (uint16_t& value : x) {
                const auto number = static_cast<float>(draw(-128, 128)) / 64;
                value = static_cast<uint16_t>(std::bit_cast<uint32_t>(number) >> 16);
            }
            const int64_t row = tile_row_bytes(depth);
            std::vector<std::byte> arranged(static_cast<size_t>(rows * row + kTileBehind),
                                            std::byte{0xff});
            std::vector<const void*> pointers;
            for (int64_t r = 0; r < rows; r += kTileRows) {
                const void* from[kTileRows];
                const int64_t some = std::min(kTileRows, rows - r);
                for (int64_t i = 0; i < some; ++i)
                    from[i] = &x[static_cast<size_t>((r + i) * depth)];
                std::byte* to = &arranged[static_cast<size_t>(r * row)];
                kernels->arrange_tiles(from, some, depth, to);
                pointers.push_back(to);
            }
            std::vector<float> y(static_cast<size_t>(rows * outputs), NAN);
            const DotJob job{.x = pointers.data(),
                             .rows = rows,
                             .w = w.data(),
                             .w_stride = stride,
                             .first = first,
                             .how = &how,
                             .scales = reinterpret_cast<const std::byte*>(scales.data()),
                             .zeros = reinterpret_cast<const std::byte*>(zeros.data()),
                             .outputs = outputs,
                             .depth = depth,
                             .y = y.data(),
                             .y_stride = outputs,
                             .from_memory = draw(0, 1) == 1};
            format.tiles(job);
            std::vector<float> decoded(static_cast<size_t>(outputs * depth));
            format.decode(job, decoded.data(), DType::kF32);
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t n = 0; n < outputs; ++n) {
                    double sum = 0;
                    double size = 0;
                    for (int64_t k = 0; k < depth; ++k) {
                        const uint16_t bits = x[static_cast<size_t>(r * depth + k)];
                        const double term = 1.0 * std::bit_cast<float>(uint32_t{bits} << 16) *
                                            decoded[static_cast<size_t>(n * depth + k)];
                        sum += term;
                        size += std::abs(term);
                    }
                    const float found = y[static_cast<size_t>(r * outputs + n)];
                    CHECK(std::abs(found - sum) <= 1e-5 * size);
                }
            }
        }
    }
}

void the_read_probe_reads_every_word() {
    ThreadPool pool(2);
    constexpr size_t kBytes = 64 << 10;
    const ScratchBuffer area(kBytes);
    for (const int streams : {1, 2, 4, 8}) {
        for (size_t word = 0; word < kBytes / 8; word += 97) {
            std::memset(area.data(), 0, kBytes);
            area.data()[word * 8 + 3] = std::byte{1};
            CHECK_EQ(read_all(pool, area.data(), kBytes, 16 << 10, streams), uint64_t{1} << 24);
        }
    }
}

}  // namespace

int main() {
    const uint32_t seed = std::random_device()();
    std::cout << "seed " << seed << "\n";
    every_task_runs_exactly_once();
    no_late_thread_takes_a_task_of_the_next_region(seed);
    callers_on_several_threads_take_turns();
    a_pool_wakes_from_sleep();
    results_are_right_and_have_the_same_bits_however_computed(seed);
    tokens_per_call_fill_the_scratch_they_are_given();
    weights_with_scales_are_summed_block_by_block(seed);
    a_matrix_unit_sums_each_output_alone(seed);
    every_format_that_is_exact_in_bf16_has_tiles();
    packed_tiles_are_the_products_of_what_is_decoded(seed);
    the_read_probe_reads_every_word();
    return test_result();
}
