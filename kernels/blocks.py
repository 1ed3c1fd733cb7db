# mypy: ignore-errors
"""The block formats of GGUF files in kernels: see moeinf/checkpoint/blocks.py.

Rows are blocks of bytes that are not aligned, so each number is put together from bytes. A tile is
float32: the products of codes and scales are not exact in narrower numbers.
"""

import triton
import triton.language as tl


@triton.jit
def byte_at(block, at, stride, mask):
    """int32 from 0 to 255."""
    return tl.load(block + at * stride, mask=mask, other=0).to(tl.int32)


@triton.jit
def signed_at(block, at, stride, mask):
    """int32 from -128 to 127."""
    byte = byte_at(block, at, stride, mask)
    return byte - ((byte & 128) << 1)


@triton.jit
def half_at(block, at, stride, mask):
    """float32 of two bytes."""
    bits = byte_at(block, at, stride, mask) | (byte_at(block, at + 1, stride, mask) << 8)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def place(row, k, stride, PACK: tl.constexpr, BYTES: tl.constexpr):
    """The block of column k, and the column's number in it."""
    return row + (k // PACK) * BYTES * stride, k % PACK


@triton.jit
def block_codes(row, k, stride, mask, FORMAT: tl.constexpr):
    """float32: numbers of columns k without scales."""
    if FORMAT == "q8_0":
        block, j = place(row, k, stride, 32, 34)
        code = signed_at(block, 2 + j, stride, mask).to(tl.float32)
    elif (FORMAT == "q4_k") or (FORMAT == "q5_k"):
        block, j = place(row, k, stride, 256, 144 if FORMAT == "q4_k" else 176)
        first = 16 if FORMAT == "q4_k" else 48
        byte = byte_at(block, first + 32 * (j // 64) + j % 32, stride, mask)
        code = (byte >> (4 * (j // 32 % 2))) & 15
        if FORMAT == "q5_k":
            high = byte_at(block, 16 + j % 32, stride, mask)
            code |= ((high >> (j // 32)) & 1) << 4
        code = code.to(tl.float32)
    elif FORMAT == "q6_k":
        block, j = place(row, k, stride, 256, 210)
        byte = byte_at(block, 64 * (j // 128) + j % 64, stride, mask)
        high = byte_at(block, 128 + 32 * (j // 128) + j % 32, stride, mask)
        code = (byte >> (4 * (j // 64 % 2))) & 15
        code = (code | (((high >> (2 * (j // 32 % 4))) & 3) << 4)) - 32
        code = code.to(tl.float32)
    else:
        block, j = place(row, k, stride, 32, 17 if FORMAT == "mxfp4" else 18)
        byte = byte_at(block, (1 if FORMAT == "mxfp4" else 2) + j % 16, stride, mask)
        code = (byte >> (4 * (j // 16))) & 15
        if FORMAT == "mxfp4":
            bits = ((code & 7) << 22) | ((code & 8) << 28)
            code = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
        elif FORMAT == "q4_0":
            code = (code - 8).to(tl.float32)
        else:
            # The numbers of moeinf/checkpoint/blocks.py: IQ4_NL, with 128 added, four in a word.
            low = tl.where(code < 4, 0x3F2D1801, 0x766A5D4F)
            high = tl.where(code < 12, 0xA6998D81, 0xF1D9C5B5)
            words = tl.where(code < 8, low.to(tl.int64), high.to(tl.int64))
            code = (((words >> (8 * (code & 3))) & 255) - 128).to(tl.float32)
    return code


@triton.jit
def block_scales(row, k, stride, mask, FORMAT: tl.constexpr):
    """float32: the scale and the minimum of the group that begins at column k."""
    if FORMAT == "q6_k":
        block, j = place(row, k, stride, 256, 210)
        scale = signed_at(block, 192 + j // 16, stride, mask).to(tl.float32)
        scale = scale * half_at(block, 208, stride, mask)
        minimum = scale * 0.0
    elif (FORMAT == "q4_k") or (FORMAT == "q5_k"):
        block, j = place(row, k, stride, 256, 144 if FORMAT == "q4_k" else 176)
        g = j // 32
        first = byte_at(block, 4 + g % 4, stride, mask)
        second = byte_at(block, 8 + g % 4, stride, mask)
        last = byte_at(block, 12 + g % 4, stride, mask)
        sixth = tl.where(g < 4, first & 63, (last & 15) | ((first >> 6) << 4))
        scale = sixth.to(tl.float32) * half_at(block, 0, stride, mask)
        sixth = tl.where(g < 4, second & 63, (last >> 4) | ((second >> 6) << 4))
        minimum = sixth.to(tl.float32) * half_at(block, 2, stride, mask)
    elif FORMAT == "mxfp4":
        block, j = place(row, k, stride, 32, 17)
        bits = byte_at(block, j * 0, stride, mask)
        # 2^(b - 127) has exponent b, except for b = 0.
        scale = tl.where(bits == 0, 0x400000, bits << 23).to(tl.float32, bitcast=True)
        minimum = scale * 0.0
    else:
        block, j = place(row, k, stride, 32, 34 if FORMAT == "q8_0" else 18)
        scale = half_at(block, j * 0, stride, mask)
        minimum = scale * 0.0
    return scale, minimum


@triton.jit
def spread(scales, COUNT: tl.constexpr, GROUPS: tl.constexpr):
    """[..., GROUPS] -> [..., COUNT]: each for as many columns."""
    if GROUPS == 1:
        result = scales
    elif len(scales.shape) == 3:
        A: tl.constexpr = scales.shape[0]
        B: tl.constexpr = scales.shape[1]
        wide = tl.broadcast_to(tl.expand_dims(scales, 3), [A, B, GROUPS, COUNT // GROUPS])
        result = tl.reshape(wide, [A, B, COUNT])
    else:
        N: tl.constexpr = scales.shape[0]
        wide = tl.broadcast_to(tl.expand_dims(scales, 2), [N, GROUPS, COUNT // GROUPS])
        result = tl.reshape(wide, [N, COUNT])
    return result


@triton.jit
def load_blocks(row, in_n, k0, K, stride, FORMAT: tl.constexpr, COUNT: tl.constexpr):
    """float32 [..., COUNT]: columns from k0 on, a multiple of COUNT, which is a power of two of at
    least 16. `row` points to rows, their last size 1."""
    GROUP: tl.constexpr = 16 if FORMAT == "q6_k" else 32
    GROUPS: tl.constexpr = COUNT // GROUP if COUNT > GROUP else 1
    k = tl.arange(0, COUNT)
    first = tl.arange(0, GROUPS) * GROUP
    if len(in_n.shape) == 3:
        k, first = k[None, None, :], first[None, None, :]
    else:
        k, first = k[None, :], first[None, :]
    k, first = k + k0, first + k0 // GROUP * GROUP
    tile = block_codes(row, k, stride, in_n & (k < K), FORMAT)
    scale, minimum = block_scales(row, first, stride, in_n & (first < K), FORMAT)
    tile = tile * spread(scale, COUNT, GROUPS)
    if (FORMAT == "q4_k") or (FORMAT == "q5_k"):
        tile = tile - spread(minimum, COUNT, GROUPS)
    return tile
