#include "compute/attention_inputs.h"

#include "compute/bf16.h"

namespace moeinf {
namespace {

float wide(float value) {
    return value;
}
float wide(BF16 value) {
    return widened(value);
}

template <class T>
T narrow(float value) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return value;
    } else {
        return rounded(value);
    }
}

// a * b, rounded.
template <class T>
float times(T a, T b) {
    return wide(narrow<T>(wide(a) * wide(b)));
}

template <class T>
void turn(T* head, const T* cos, const T* sin, const Turns& turns) {
    const int64_t half = turns.turned / 2;
    const int64_t other = turns.half ? 0 : half;  // place of the cos and sin of the second half
    for (int64_t i = 0; i < half; ++i) {
        const T a = head[i];
        const T b = head[i + half];
        head[i] = narrow<T>(times(a, cos[i]) - times(b, sin[i]));
        head[i + half] = narrow<T>(times(b, cos[i + other]) + times(a, sin[i + other]));
    }
}

template <class T>
void turn_all(const AttentionCall& call, const LinearPart& part) {
    const int64_t tokens = call.linear.tokens / call.batch;
    const Turns& turns = call.turns;
    auto* head = static_cast<T*>(part.out);
    for (int64_t row = 0; row < call.linear.tokens; ++row) {
        const int64_t at = row / tokens * turns.batch_stride + row % tokens * turns.token_stride;
        for (int64_t h = 0; h < part.weight.rows / call.head_dim; ++h, head += call.head_dim) {
            turn(head, static_cast<const T*>(turns.cos) + at, static_cast<const T*>(turns.sin) + at,
                 turns);
        }
    }
}

}  // namespace

void attention_inputs(CpuEngine& engine, const AttentionCall& call) {
    linear(engine, call.linear, call.parts);
    for (size_t p = 0; p < call.norms.size(); ++p) {
        const LinearPart& part = call.parts[p];
        const AttentionNorm& of = call.norms[p];
        if (of.weight != nullptr) {
            const int64_t rows = call.linear.tokens * part.weight.rows / of.cols;
            rms_norm(engine, of.norm,
                     {part.out, of.cols, rows, of.cols, of.weight, part.out, call.linear.x_dtype});
        }
        if (call.linear.x_dtype == DType::kBF16) {
            turn_all<BF16>(call, part);
        } else {
            turn_all<float>(call, part);
        }
    }
}

}  // namespace moeinf
