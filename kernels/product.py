# mypy: ignore-errors
"""One tile of a matrix product, for the kernels that use the tensor cores."""

import triton
import triton.language as tl


@triton.jit
def multiply(a, b, acc, UPCAST: tl.constexpr):
    """acc + a @ b: a [M, K] and b [K, N] of one dtype, acc [M, N] float32.

    UPCAST multiplies in float32, for dtypes that the device's tensor cores lack.
    """
    if UPCAST:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc
