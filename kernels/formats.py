# mypy: ignore-errors
"""How stored weights become numbers: the one place where kernels know weight formats.

A new format is one row of `FORMATS` and one branch of `load_values`, or of blocks.py. No kernel
changes: every kernel hands the pointers and strides of a matrix to `load_tile` or `add_product`.
Matrices without scales pass None for their pointer and strides. None is a constant to Triton: the
machine code has no trace of it.

Values without their scales are exact in bfloat16. Scales of one byte are too, and so are the
products with values of four bits. All other scales multiply float32 sums.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .blocks import add_block_product, load_blocks, row_at
from .palette import load_palette
from .product import multiply

TOKENS = (torch.bfloat16, torch.float16, torch.float32)
# By dtype of a matrix's scales. Bytes are exponents of powers of two.
SCALE_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "float",
    torch.float16: "float",
    torch.uint8: "e8m0",
    torch.float8_e4m3fn: "e4m3",
}


@dataclass(frozen=True)
class Format:
    """One row: the dtype of `Matrix.values`, and the dtypes of tokens that it is computed with.

    pack: elements in one stored value, or in a block of `unit` bytes. group: elements of a block
    that share one of its scales, 0 where blocks have none. tail: bytes after the blocks of a row.
    scaled: a matrix may have scales and a multiplier. zeros: and zero points, which leave integers
    that are exact in bfloat16.
    """

    values: torch.dtype
    tokens: tuple[torch.dtype, ...] = TOKENS
    pack: int = 1
    unit: int = 1
    group: int = 0
    tail: int = 0
    scaled: bool = True
    zeros: bool = False

    def stored(self, cols: int) -> int:
        """Stored values of a row of that many elements."""
        return cols // self.pack * self.unit + self.tail

    def cols(self, stored: int) -> int:
        return (stored - self.tail) // self.unit * self.pack


FORMATS = {
    "bf16": Format(torch.bfloat16, (torch.bfloat16,), scaled=False),
    "f16": Format(torch.float16, (torch.float16,), scaled=False),
    "f32": Format(torch.float32, (torch.float32,), scaled=False),
    "e4m3": Format(torch.float8_e4m3fn),
    "e2m1": Format(torch.uint8, pack=2),
    "int8": Format(torch.int8, zeros=True),
    "int4": Format(torch.uint8, pack=2, zeros=True),
    "q8_0": Format(torch.uint8, pack=32, unit=34, group=32, scaled=False),
    "q4_0": Format(torch.uint8, pack=32, unit=18, group=32, scaled=False),
    "q4_1": Format(torch.uint8, pack=32, unit=20, group=32, scaled=False),
    "q5_0": Format(torch.uint8, pack=32, unit=22, group=32, scaled=False),
    "q5_1": Format(torch.uint8, pack=32, unit=24, group=32, scaled=False),
    "iq4_nl": Format(torch.uint8, pack=32, unit=18, group=32, scaled=False),
    "mxfp4": Format(torch.uint8, pack=32, unit=17, group=32, scaled=False),
    "iq4_xs": Format(torch.uint8, pack=256, unit=136, group=32, scaled=False),
    "q2_k": Format(torch.uint8, pack=256, unit=84, group=16, scaled=False),
    "q3_k": Format(torch.uint8, pack=256, unit=110, group=16, scaled=False),
    "q4_k": Format(torch.uint8, pack=256, unit=144, group=32, scaled=False),
    "q5_k": Format(torch.uint8, pack=256, unit=176, group=32, scaled=False),
    "q6_k": Format(torch.uint8, pack=256, unit=210, group=16, scaled=False),
    "palette3": Format(torch.uint8, pack=64, unit=96, tail=16, scaled=False),
    "palette7": Format(torch.uint8, pack=64, unit=96, tail=32, scaled=False),
    "palette15": Format(torch.uint8, pack=64, unit=96, tail=64, scaled=False),
}


def tuned_as(format_: str) -> str:
    """The name that the tuning table has for it: one for all that differ in their tails alone."""
    return format_.rstrip("0123456789") if FORMATS[format_].tail else format_


def folds(format_: str, scales: torch.Tensor | None, tokens: torch.dtype) -> bool:
    """Whether values times scales are numbers of the dtype of the tokens, without loss."""
    if scales is None or tokens != torch.bfloat16:
        return False
    return SCALE_TYPES[scales.dtype] == "e8m0" or (
        SCALE_TYPES[scales.dtype] == "e4m3" and format_ == "e2m1"
    )


@triton.jit
def e4m3_value(byte):
    """uint8 -> float32. Exponent and mantissa at their places; the exponent lacks 120."""
    bits = byte.to(tl.int32)
    bits = ((bits & 0x7F) << 20) | ((bits & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def nibble_value(code, FORMAT: tl.constexpr):
    """int32 from 0 to 15 -> float32."""
    if FORMAT == "int4":
        value = (code - 8).to(tl.float32)
    else:
        bits = ((code & 7) << 22) | ((code & 8) << 28)
        value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    return value


@triton.jit
def columns_of(first, n, COUNT: tl.constexpr, K_FIRST: tl.constexpr):
    """first, first + 1, ... along the last dimension of n, or along the first one."""
    k = first + tl.arange(0, COUNT)
    if K_FIRST:
        k = k[:, None]
    elif len(n.shape) == 3:
        k = k[None, None, :]
    else:
        k = k[None, :]
    return k


@triton.jit
def load_values(
    values_ptr, slot, n, in_n, k0, K, stride_s, stride_n, stride_k,
    FORMAT: tl.constexpr, COUNT: tl.constexpr, K_FIRST: tl.constexpr,
):  # fmt: skip
    """Decoded values without their scales: as stored in plain formats, else float32."""
    # int64, because slot * stride passes 2^31 in any real pool.
    row = values_ptr + slot * stride_s + n.to(tl.int64) * stride_n
    # The parentheses are for Triton 3.2.
    if FORMAT == "e2m1" or FORMAT == "int4":
        # Shifts, because the compiler does not see the alignment of a quotient.
        half = columns_of(k0 >> 1, n, COUNT // 2, K_FIRST)
        byte = tl.load(row + half * stride_k, mask=in_n & (half < (K >> 1)), other=0).to(tl.int32)
        low, high = nibble_value(byte & 15, FORMAT), nibble_value(byte >> 4, FORMAT)
        if K_FIRST:
            tile = tl.trans(tl.interleave(tl.trans(low), tl.trans(high)))
        else:
            tile = tl.interleave(low, high)
    else:
        k = columns_of(k0, n, COUNT, K_FIRST)
        stored = tl.load(row + k * stride_k, mask=in_n & (k < K), other=0)
        if FORMAT == "e4m3":
            tile = e4m3_value(stored)
        elif FORMAT == "int8":
            tile = stored.to(tl.float32)
        elif (FORMAT == "bf16" or FORMAT == "f16") or FORMAT == "f32":
            tile = stored
        else:
            tl.static_assert(False, "weight format: no loader")
    return tile


@triton.jit
def load_scales(
    scales_ptr, slot, n, in_n, k0, K, stride_s, stride_n, stride_k,
    SCALE_TYPE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, COUNT: tl.constexpr,
    K_FIRST: tl.constexpr,
):  # fmt: skip
    """float32: the scales of COUNT blocks of columns from column k0 on, SCALE_K columns each."""
    first = 0 if SCALE_K == 0 else k0 // SCALE_K
    block = columns_of(first, n, COUNT, K_FIRST)
    row = scales_ptr + slot * stride_s + (n // SCALE_N).to(tl.int64) * stride_n
    stored = tl.load(row + block * stride_k, mask=in_n & (block * SCALE_K < K), other=0)
    if SCALE_TYPE == "e8m0":
        bits = stored.to(tl.int32)
        # 2^(b - 127) has exponent b, except for b = 0.
        scale = tl.where(bits == 0, 0x400000, bits << 23).to(tl.float32, bitcast=True)
    elif SCALE_TYPE == "e4m3":
        scale = e4m3_value(stored)
    else:
        scale = stored.to(tl.float32)
    return scale


@triton.jit
def load_zeros(
    zeros_ptr, scales_ptr, slot, n, in_n, k0, K, stride_s, stride_n, stride_k,
    SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, COUNT: tl.constexpr, K_FIRST: tl.constexpr,
):  # fmt: skip
    """The same for zero points; the strides are those of the scales."""
    bytes_of_scale: tl.constexpr = scales_ptr.dtype.element_ty.primitive_bitwidth // 8
    return load_scales(
        zeros_ptr, slot, n, in_n, k0, K, stride_s * bytes_of_scale, stride_n, stride_k,
        "int8", SCALE_N, SCALE_K, COUNT, K_FIRST,
    )  # fmt: skip


@triton.jit
def by_blocks(
    tile, numbers, COUNT: tl.constexpr, BLOCKS: tl.constexpr, SUBTRACT: tl.constexpr = False
):
    """tile [..., COUNT] times (or minus) numbers [..., BLOCKS], each for COUNT / BLOCKS columns."""
    if len(tile.shape) == 3:
        A: tl.constexpr = tile.shape[0]
        B: tl.constexpr = tile.shape[1]
        parts = tl.reshape(tile, [A, B, BLOCKS, COUNT // BLOCKS])
        spread = tl.expand_dims(tl.broadcast_to(numbers, [A, B, BLOCKS]), 3)
        found = tl.reshape(parts - spread if SUBTRACT else parts * spread, [A, B, COUNT])
    else:
        N: tl.constexpr = tile.shape[0]
        parts = tl.reshape(tile, [N, BLOCKS, COUNT // BLOCKS])
        spread = tl.expand_dims(numbers, 2)
        found = tl.reshape(parts - spread if SUBTRACT else parts * spread, [N, COUNT])
    return found


@triton.jit
def load_tile(
    values_ptr, scales_ptr, zeros_ptr, slot, n, in_n, k0, K,
    stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
    DTYPE: tl.constexpr, FORMAT: tl.constexpr, SCALE_TYPE: tl.constexpr, SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Weights of rows n and of COUNT columns from k0 on, with their scales. Called inside kernels.

    | argument | shape, dtype | meaning |
    |---|---|---|
    | values_ptr | [S, N, K] as stored, strides (stride_ws, stride_wn, stride_wk) | |
    | scales_ptr | [S, N / SCALE_N, K / SCALE_K], strides (stride_cs, ...) | or None |
    | zeros_ptr | int8, where the scales are, see Matrix | or None |
    | slot | int64, one or a block | which slot |
    | n, in_n | int32 block and mask, their last size 1 | row (output) of the matrix |
    | k0, K | | first column (summed) of the tile; columns of the matrix |
    | FORMAT, SCALE_TYPE | | how values and scales are stored; see blocks.py, palette.py |
    | SCALE_N, SCALE_K | | rows and columns that share a scale; 0 columns: all |

    The shapes of slot, n and in_n broadcast; the columns are the last dimension of the tile.
    Columns beyond the matrix, and rows whose mask is false, are 0 in plain formats; else they are
    numbers of no meaning, but finite.
    """
    if SCALE_TYPE == "blocks":
        row = values_ptr + slot * stride_ws + row_at(n, stride_wn, FORMAT)
        tile = load_blocks(row, in_n, k0, K, FORMAT, COUNT)
    elif SCALE_TYPE == "palette":
        row = values_ptr + slot * stride_ws + n.to(tl.int64) * stride_wn
        tile = load_palette(row, in_n, k0, K, COUNT, DTYPE)
    else:
        tile = load_values(
            values_ptr, slot, n, in_n, k0, K, stride_ws, stride_wn, stride_wk, FORMAT, COUNT, False
        )
    if scales_ptr is not None:
        if (SCALE_K == 0) or (SCALE_K >= COUNT):
            if zeros_ptr is not None:
                tile = tile - load_zeros(
                    zeros_ptr, scales_ptr, slot, n, in_n, k0, K, stride_cs, stride_cn, stride_ck,
                    SCALE_N, SCALE_K, 1, False,
                )  # fmt: skip
            tile = tile * load_scales(
                scales_ptr, slot, n, in_n, k0, K, stride_cs, stride_cn, stride_ck,
                SCALE_TYPE, SCALE_N, SCALE_K, 1, False,
            )  # fmt: skip
        else:
            if zeros_ptr is not None:
                zeros = load_zeros(
                    zeros_ptr, scales_ptr, slot, n, in_n, k0, K, stride_cs, stride_cn, stride_ck,
                    SCALE_N, SCALE_K, COUNT // SCALE_K, False,
                )  # fmt: skip
                tile = by_blocks(tile, zeros, COUNT, COUNT // SCALE_K, True)
            scales = load_scales(
                scales_ptr, slot, n, in_n, k0, K, stride_cs, stride_cn, stride_ck,
                SCALE_TYPE, SCALE_N, SCALE_K, COUNT // SCALE_K, False,
            )  # fmt: skip
            tile = by_blocks(tile, scales, COUNT, COUNT // SCALE_K)
    return tile.to(DTYPE)


@triton.jit
def add_product(
    acc, x, values_ptr, scales_ptr, zeros_ptr, slot, n, in_n, k0, K,
    stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
    FORMAT: tl.constexpr, SCALE_TYPE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    FOLD: tl.constexpr, UPCAST: tl.constexpr, COUNT: tl.constexpr, K_FIRST: tl.constexpr,
):  # fmt: skip
    """acc + weights @ x, or acc + x @ weights if K_FIRST: n and in_n then have rows last.

    Other arguments as for load_tile, for one slot. FOLD: values times scales are exact in the dtype
    of x. Where they are not, the tile lies within one group of columns, and the scales multiply its
    sums. UPCAST: see multiply.
    """
    # The parentheses are for Triton 3.2.
    if (SCALE_TYPE == "blocks") and ((not FOLD) and (not UPCAST)):
        row = values_ptr + slot * stride_ws + row_at(n, stride_wn, FORMAT)
        acc = add_block_product(acc, x, row, in_n, k0, K, FORMAT, COUNT, K_FIRST)
    else:
        if (SCALE_TYPE is None) or ((SCALE_TYPE != "palette") and ((not FOLD) and (not UPCAST))):
            w = load_values(
                values_ptr, slot, n, in_n, k0, K, stride_ws, stride_wn, stride_wk, FORMAT, COUNT,
                K_FIRST,
            )  # fmt: skip
            if zeros_ptr is not None:
                w = w - load_zeros(
                    zeros_ptr, scales_ptr, slot, n, in_n, k0, K, stride_cs, stride_cn, stride_ck,
                    SCALE_N, SCALE_K, 1, K_FIRST,
                )  # fmt: skip
            w = w.to(x.dtype)
        else:
            rows, in_rows = n, in_n
            if K_FIRST:
                rows, in_rows = tl.trans(n), tl.trans(in_n)
            w = load_tile(
                values_ptr, scales_ptr, zeros_ptr, slot, rows, in_rows, k0, K,
                stride_ws, stride_wn, stride_wk, stride_cs, stride_cn, stride_ck,
                tl.float32 if UPCAST else x.dtype, FORMAT, SCALE_TYPE, SCALE_N, SCALE_K, COUNT,
            )  # fmt: skip
            if K_FIRST:
                w = tl.trans(w)
        if (scales_ptr is None) or (FOLD or UPCAST):
            acc = multiply(x, w, acc, UPCAST) if K_FIRST else multiply(w, x, acc, UPCAST)
        else:
            part = tl.zeros(acc.shape, tl.float32)
            part = multiply(x, w, part, UPCAST) if K_FIRST else multiply(w, x, part, UPCAST)
            acc = tl.fma(
                part,
                tl.broadcast_to(
                    load_scales(
                        scales_ptr, slot, n, in_n, k0, K, stride_cs, stride_cn, stride_ck,
                        SCALE_TYPE, SCALE_N, SCALE_K, 1, K_FIRST,
                    ),
                    acc.shape,
                ),
                acc,
            )  # fmt: skip
    return acc


@triton.jit
def multiplied(sums, multiplier_ptr, slot, mask, stride_ms):
    """Sums times the multiplier of their slot, where the matrix has one."""
    if multiplier_ptr is not None:
        sums = sums * tl.load(multiplier_ptr + slot * stride_ms, mask=mask, other=0.0)
    return sums
