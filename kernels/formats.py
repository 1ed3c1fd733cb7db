# mypy: ignore-errors
"""How stored weights become numbers: the one place where kernels know weight formats.

A new format is one row of `FORMATS`, one loader, and one line in `load_tile`. No kernel changes:
every kernel hands the pointers and strides of a matrix to `load_tile` and gets a tile of values.
Formats without scales pass None for their pointer and strides. None is a constant to Triton: the
machine code has no trace of it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Format:
    """One row: the dtype of `Matrix.values`, and the dtypes of tokens that it is computed with."""

    values: torch.dtype
    tokens: tuple[torch.dtype, ...]
    has_scales: bool = False


FORMATS = {
    "bf16": Format(torch.bfloat16, (torch.bfloat16,)),
    "f16": Format(torch.float16, (torch.float16,)),
    "f32": Format(torch.float32, (torch.float32,)),
}


@triton.jit
def load_plain(values_ptr, slot, n, k, mask, stride_s, stride_n, stride_k):
    """One element per value, no scales."""
    # int64, because slot * stride passes 2^31 in any real pool.
    row = values_ptr + slot * stride_s + n.to(tl.int64) * stride_n
    return tl.load(row + k * stride_k, mask=mask, other=0.0)


@triton.jit
def load_tile(
    values_ptr, scales_ptr, slot, n, k, in_n, in_k,
    stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
    DTYPE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Weights at (slot, n, k) as DTYPE, 0 where a mask is false. Called inside the kernels.

    | argument | shape, dtype | meaning |
    |---|---|---|
    | values_ptr | [S, N, K] as stored, strides (stride_ws, stride_wn, stride_wk) | |
    | scales_ptr | as stored, strides (stride_cs, stride_cn, stride_ck) | or None |
    | slot | int64, one or a block | which slot |
    | n, k | int32 blocks | row (output) and column (summed) of the matrix |
    | in_n, in_k | masks of n and k | |

    The shapes of slot, n, k and the masks broadcast to the tile that is returned, in whatever order
    of dimensions the kernel wants.
    """
    # The parentheses are for Triton 3.2.
    if (FORMAT == "bf16" or FORMAT == "f16") or FORMAT == "f32":
        tile = load_plain(values_ptr, slot, n, k, in_n & in_k, stride_ws, stride_wn, stride_wk)
    else:
        tl.static_assert(False, "weight format: no loader")
    return tile.to(DTYPE)
