# mypy: ignore-errors
"""The block formats of GGUF files in kernels: see moeinf/checkpoint/blocks.py.

Blocks of 34, 18, 22, 110 or 210 bytes begin at even places, those of 20 and 84 at multiples of 4,
of 24 and 136 at multiples of 8, of 144 and 176 at multiples of 16, and those of 17 anywhere. Loads
are as wide as that allows: neighbouring columns have neighbouring bytes, which Triton joins, and
scales are read as words. A byte of some codes is loaded for each of them, from L1 but for the first
time: no thread passes codes to another one.
Codes are exact in bfloat16; their products with scales only in float32. So tensor cores multiply
the codes of one group, and its scale multiplies the sums.
"""

import triton
import triton.language as tl

from .product import multiply


@triton.jit
def byte_at(block, at, mask):
    """int32 from 0 to 255."""
    return tl.load(block + at, mask=mask, other=0).to(tl.int32)


@triton.jit
def signed_at(block, at, mask):
    """int32 from -128 to 127."""
    byte = byte_at(block, at, mask)
    return byte - ((byte & 128) << 1)


@triton.jit
def half_at(block, at, mask):
    """int32 of two bytes at an even place."""
    pointer = (block + at).to(tl.pointer_type(tl.uint16), bitcast=True)
    return tl.load(pointer, mask=mask, other=0).to(tl.int32)


@triton.jit
def word_at(block, at, mask):
    """int32 of four bytes at a multiple of four."""
    pointer = (block + at).to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(pointer, mask=mask, other=0)


@triton.jit
def number(half):
    """float32 of the float16 in the lower half of an int32."""
    return (half & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def row_at(n, stride, FORMAT: tl.constexpr):
    """int64: bytes from row 0 to row n. The shifts show Triton that they are whole words."""
    SHIFT: tl.constexpr = (
        0 if FORMAT == "mxfp4" else 3 if FORMAT == "q5_1" else 3 if FORMAT == "iq4_xs" else
        2 if FORMAT == "q4_1" else 2 if FORMAT == "q2_k" else 1
    )  # fmt: skip
    return (n.to(tl.int64) * (stride >> SHIFT)) << SHIFT


@triton.jit
def place(row, k, PACK: tl.constexpr, BYTES: tl.constexpr):
    """The block of column k, and the column's number in it."""
    return row + (k // PACK) * BYTES, k % PACK


@triton.jit
def small_block(row, k, FORMAT: tl.constexpr):
    """The same in formats of 32 columns, and the first byte of the codes."""
    BYTES: tl.constexpr = (
        34 if FORMAT == "q8_0" else 17 if FORMAT == "mxfp4" else
        20 if FORMAT == "q4_1" else 22 if FORMAT == "q5_0" else 24 if FORMAT == "q5_1" else 18
    )  # fmt: skip
    block, j = place(row, k, 32, BYTES)
    return block, j, BYTES - (32 if FORMAT == "q8_0" else 16)


@triton.jit
def block_codes(row, k, mask, fifth, FORMAT: tl.constexpr):
    """float32: numbers of columns k without scales. `fifth`: see fifth_bits."""
    if FORMAT == "q8_0":
        block, j, first = small_block(row, k, FORMAT)
        code = signed_at(block, first + j, mask).to(tl.float32)
    elif (FORMAT == "q4_k") or (FORMAT == "q5_k"):
        block, j = place(row, k, 256, 144 if FORMAT == "q4_k" else 176)
        first = 16 if FORMAT == "q4_k" else 48
        byte = byte_at(block, first + 32 * (j // 64) + j % 32, mask)
        code = (byte >> (4 * (j // 32 % 2))) & 15
        if FORMAT == "q5_k":
            high = byte_at(block, 16 + j % 32, mask)
            code |= ((high >> (j // 32)) & 1) << 4
        code = code.to(tl.float32)
    elif (FORMAT == "q2_k") or (FORMAT == "q3_k"):
        block, j = place(row, k, 256, 84 if FORMAT == "q2_k" else 110)
        first = 16 if FORMAT == "q2_k" else 32
        byte = byte_at(block, first + 32 * (j // 128) + j % 32, mask)
        code = (byte >> (2 * (j // 32 % 4))) & 3
        if FORMAT == "q3_k":
            high = byte_at(block, j % 32, mask)
            code = (code | (((high >> (j // 32)) & 1) << 2)) - 4
        code = code.to(tl.float32)
    elif FORMAT == "q6_k":
        block, j = place(row, k, 256, 210)
        byte = byte_at(block, 64 * (j // 128) + j % 64, mask)
        high = byte_at(block, 128 + 32 * (j // 128) + j % 32, mask)
        code = (byte >> (4 * (j // 64 % 2))) & 15
        code = (code | (((high >> (2 * (j // 32 % 4))) & 3) << 4)) - 32
        code = code.to(tl.float32)
    else:
        if FORMAT == "iq4_xs":
            block, j = place(row, k, 256, 136)
            first = 8 + 16 * (j // 32)
        else:
            block, j, first = small_block(row, k, FORMAT)
        # k % 16 and not j % 16, in which Triton sees no neighbours.
        byte = byte_at(block, first + k % 16, mask)
        code = (byte >> (4 * (j // 16 % 2))) & 15
        if FORMAT == "mxfp4":
            bits = ((code & 7) << 22) | ((code & 8) << 28)
            code = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
        elif FORMAT == "q4_0":
            code = (code - 8).to(tl.float32)
        elif FORMAT == "q4_1":
            code = code.to(tl.float32)
        elif (FORMAT == "iq4_nl") or (FORMAT == "iq4_xs"):
            # The numbers of moeinf/checkpoint/blocks.py: IQ4_NL, with 128 added, four in an int32.
            low = tl.where(code < 4, 0x3F2D1801, 0x766A5D4F)
            high = tl.where(code < 12, 0xA6998D81 - 2**32, 0xF1D9C5B5 - 2**32)
            byte = (tl.where(code < 8, low, high) >> (8 * (code & 3))) & 255
            code = byte.to(tl.float32) - 128
        else:
            code |= ((fifth >> j) & 1) << 4
            code = (code - 16 if FORMAT == "q5_0" else code).to(tl.float32)
    return code


@triton.jit
def fifth_bits(row, k, mask, FORMAT: tl.constexpr):
    """int32: bit j belongs to the code of column j of the block that begins at column k."""
    block, _, _ = small_block(row, k, FORMAT)
    if FORMAT == "q5_1":
        bits = word_at(block, 4, mask)
    else:
        bits = half_at(block, 2, mask) | (half_at(block, 4, mask) << 16)
    return bits


@triton.jit
def block_scales(row, k, mask, FORMAT: tl.constexpr):
    """float32: the scale and the minimum of the group that begins at column k."""
    if FORMAT == "q6_k":
        block, j = place(row, k, 256, 210)
        scale = signed_at(block, 192 + j // 16, mask).to(tl.float32)
        scale = scale * number(half_at(block, 208, mask))
        minimum = scale * 0.0
    elif (FORMAT == "q4_k") or (FORMAT == "q5_k"):
        block, j = place(row, k, 256, 144 if FORMAT == "q4_k" else 176)
        g, shift = j // 32, 8 * (j // 32 % 4)
        factors, last = word_at(block, 0, mask), word_at(block, 12, mask) >> shift
        first, second = word_at(block, 4, mask) >> shift, word_at(block, 8, mask) >> shift
        sixth = tl.where(g < 4, first & 63, (last & 15) | ((first >> 2) & 48))
        scale = sixth.to(tl.float32) * number(factors)
        sixth = tl.where(g < 4, second & 63, ((last >> 4) & 15) | ((second >> 2) & 48))
        minimum = sixth.to(tl.float32) * number(factors >> 16)
    elif FORMAT == "q2_k":
        block, j = place(row, k, 256, 84)
        both, factors = byte_at(block, j // 16, mask), word_at(block, 80, mask)
        scale = (both & 15).to(tl.float32) * number(factors)
        minimum = (both >> 4).to(tl.float32) * number(factors >> 16)
    elif FORMAT == "q3_k":
        block, j = place(row, k, 256, 110)
        g = j // 16
        low = byte_at(block, 96 + g % 8, mask) >> (4 * (g // 8))
        high = byte_at(block, 104 + g % 4, mask) >> (2 * (g // 4))
        scale = (((low & 15) | ((high & 3) << 4)) - 32).to(tl.float32)
        scale = scale * number(half_at(block, 108, mask))
        minimum = scale * 0.0
    elif FORMAT == "iq4_xs":
        block, j = place(row, k, 256, 136)
        g, factors = j // 32, word_at(block, 0, mask)
        low = word_at(block, 4, mask) >> (4 * g)
        high = factors >> (16 + 2 * g)
        scale = (((low & 15) | ((high & 3) << 4)) - 32).to(tl.float32) * number(factors)
        minimum = scale * 0.0
    elif FORMAT == "mxfp4":
        block, _, _ = small_block(row, k, FORMAT)
        bits = byte_at(block, 0, mask)
        # 2^(b - 127) has exponent b, except for b = 0.
        scale = tl.where(bits == 0, 0x400000, bits << 23).to(tl.float32, bitcast=True)
        minimum = scale * 0.0
    elif (FORMAT == "q4_1") or (FORMAT == "q5_1"):
        block, _, _ = small_block(row, k, FORMAT)
        factors = word_at(block, 0, mask)
        scale, minimum = number(factors), -number(factors >> 16)
    else:
        block, _, _ = small_block(row, k, FORMAT)
        scale = number(half_at(block, 0, mask))
        minimum = scale * 0.0
    return scale, minimum


@triton.jit
def spread(groups, COUNT: tl.constexpr, GROUPS: tl.constexpr):
    """[..., GROUPS] -> [..., COUNT]: each for as many columns."""
    if GROUPS == 1:
        result = groups
    elif len(groups.shape) == 3:
        A: tl.constexpr = groups.shape[0]
        B: tl.constexpr = groups.shape[1]
        wide = tl.broadcast_to(tl.expand_dims(groups, 3), [A, B, GROUPS, COUNT // GROUPS])
        result = tl.reshape(wide, [A, B, COUNT])
    else:
        N: tl.constexpr = groups.shape[0]
        wide = tl.broadcast_to(tl.expand_dims(groups, 2), [N, GROUPS, COUNT // GROUPS])
        result = tl.reshape(wide, [N, COUNT])
    return result


@triton.jit
def load_blocks(row, in_n, k0, K, FORMAT: tl.constexpr, COUNT: tl.constexpr):
    """float32 [..., COUNT]: columns from k0 on, a multiple of COUNT, which is a power of two of at
    least 16. `row` points to rows, their last size 1."""
    GROUP: tl.constexpr = (
        16 if FORMAT == "q2_k" else 16 if FORMAT == "q3_k" else 16 if FORMAT == "q6_k" else 32
    )  # fmt: skip
    GROUPS: tl.constexpr = COUNT // GROUP if COUNT > GROUP else 1
    k = tl.arange(0, COUNT)
    first = tl.arange(0, GROUPS) * GROUP
    if len(in_n.shape) == 3:
        k, first = k[None, None, :], first[None, None, :]
    else:
        k, first = k[None, :], first[None, :]
    k, first = k + k0, first + k0 // GROUP * GROUP
    in_first = in_n & (first < K)
    fifth = 0
    if (FORMAT == "q5_0") or (FORMAT == "q5_1"):
        fifth = spread(fifth_bits(row, first, in_first, FORMAT), COUNT, GROUPS)
    tile = block_codes(row, k, in_n & (k < K), fifth, FORMAT)
    scale, minimum = block_scales(row, first, in_first, FORMAT)
    tile = tile * spread(scale, COUNT, GROUPS)
    if ((FORMAT == "q4_1") or (FORMAT == "q5_1")) or (
        (FORMAT == "q2_k") or ((FORMAT == "q4_k") or (FORMAT == "q5_k"))
    ):
        tile = tile - spread(minimum, COUNT, GROUPS)
    return tile


@triton.jit
def add_block_product(
    acc, x, row, in_n, k0, K, FORMAT: tl.constexpr, COUNT: tl.constexpr, K_FIRST: tl.constexpr
):
    """acc + weights @ x, or acc + x @ weights if K_FIRST: `row` and in_n then have rows last. The
    COUNT columns from k0 on lie in one group; x has a dtype in which codes are exact."""
    k = k0 + tl.arange(0, COUNT)
    k = k[:, None] if K_FIRST else k[None, :]
    fifth = 0
    if (FORMAT == "q5_0") or (FORMAT == "q5_1"):
        fifth = fifth_bits(row, k0, in_n, FORMAT)
    codes = block_codes(row, k, in_n & (k < K), fifth, FORMAT).to(x.dtype)
    scale, minimum = block_scales(row, k0, in_n, FORMAT)
    part = tl.zeros(acc.shape, tl.float32)
    part = multiply(x, codes, part, False) if K_FIRST else multiply(codes, x, part, False)
    acc = tl.fma(part, tl.broadcast_to(scale, acc.shape), acc)
    if ((FORMAT == "q4_1") or (FORMAT == "q5_1")) or (
        (FORMAT == "q2_k") or ((FORMAT == "q4_k") or (FORMAT == "q5_k"))
    ):
        # Each column of the group has the minimum: it multiplies the sum of x.
        if K_FIRST:
            total = tl.sum(x.to(tl.float32), axis=1)[:, None]
        else:
            total = tl.sum(x.to(tl.float32), axis=0)[None, :]
        least = tl.broadcast_to(-minimum, acc.shape)
        acc = tl.fma(tl.broadcast_to(total, acc.shape), least, acc)
    return acc
