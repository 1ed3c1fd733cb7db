# mypy: ignore-errors
"""The gate functions between the two products, in float32, as one function for all kernels.

`ACTIVATIONS` is the list of names that the contract accepts; the kernels receive its index.
"""

import triton
import triton.language as tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_clamped")

SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
RELU = tl.constexpr(3)
RELU2 = tl.constexpr(4)
SWIGLU_CLAMPED = tl.constexpr(5)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(gate, up, alpha, limit, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """act(gate) * up, or act(gate) alone when not GATED; `gate` and `up` are float32, any shape.

    swiglu_clamped is GPT-OSS's: with g = min(gate, limit) and u = clamp(up, -limit, limit),
    (u + 1) * g * sigmoid(alpha * g).
    """
    if ACTIVATION == SWIGLU_CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        value = gate * sigmoid(gate * alpha)
    elif ACTIVATION == SILU:
        value = gate * sigmoid(gate)
    elif ACTIVATION == GELU:
        value = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        # 0.5 * (1 + tanh(z)) is sigmoid(2z).
        value = gate * sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    elif ACTIVATION == RELU:
        value = tl.maximum(gate, 0.0)
    else:
        value = tl.maximum(gate, 0.0)
        value = value * value
    if GATED:
        value = value * up
    return value
