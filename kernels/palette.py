# mypy: ignore-errors
"""bf16 weights in 12 bits in kernels: see moeinf/checkpoint/palette.py.

A tile is decoded without its rare weights, which come out as 0. After the loop over the columns a
kernel adds their products to its sums: `add_rare`.
"""

import triton
import triton.language as tl

from .blocks import byte_at, word_at


@triton.jit
def two_numbers(bits, DTYPE: tl.constexpr):
    """The numbers whose bfloat16 are the lower and the upper half of each int32, side by side."""
    if tl.bfloat16 == DTYPE:
        lower = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        upper = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        lower = (bits << 16).to(tl.float32, bitcast=True)
        upper = (bits & -0x10000).to(tl.float32, bitcast=True)
    return tl.interleave(lower, upper)


@triton.jit
def load_palette(row, in_n, k0, K, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """[..., COUNT]: columns from k0 on, rare ones as 0; k0 and COUNT are multiples of 4.

    bfloat16 if that is DTYPE, else float32. `row` points to rows, their last size 1. What the masks
    exclude is finite. Four columns at a time: the bytes of a word are their codes, those of another
    one their signs and fractions.
    """
    word = tl.arange(0, COUNT // 4)
    word = word[None, None, :] if len(in_n.shape) == 3 else word[None, :]
    # Shifts, because the compiler does not see the alignment of a quotient.
    word += k0 >> 2
    mask = in_n & (word < (K >> 2))
    word = word.to(tl.uint32)  # whose quotients are shifts
    base = byte_at(row + K // 64 * 96, 0, in_n) * 0x01010101
    words = row.to(tl.pointer_type(tl.int32), bitcast=True) + word // 16 * 24
    codes = tl.load(words + word % 8, mask=mask, other=0) >> (word // 8 % 2 * 4).to(tl.int32)
    rest = tl.load(words + (8 + word % 16), mask=mask, other=0)
    codes = codes & 0x0F0F0F0F
    # Bytes of 255 where a code is 15, and so an exponent 0. No sum of bytes exceeds one.
    kept = ~((((codes + 0x01010101) >> 4) & 0x01010101) * 255)
    exponents = (codes & kept) + (base & kept)
    # Two numbers in a word: of its columns 0 and 2, and of 1 and 3.
    even = ((exponents << 7) & 0x7F807F80) | (rest & 0x007F007F) | ((rest << 8) & -0x7FFF8000)
    odd = ((exponents >> 1) & 0x7F807F80) | ((rest >> 8) & 0x007F007F) | (rest & -0x7FFF8000)
    return tl.interleave(two_numbers(even, DTYPE), two_numbers(odd, DTYPE))


@triton.jit
def add_rare(
    sums, x, in_x, values_ptr, slot, n, in_n, K, stride_s, stride_n,
    FORMAT: tl.constexpr, SCALE_TYPE: tl.constexpr,
):  # fmt: skip
    """Sums plus the products of the rare weights of rows n, where the format has any.

    `x` points to the first column of a token, of one or of a block; in_x is its mask. The shapes of
    x, slot and n broadcast to that of the sums.
    """
    if SCALE_TYPE == "palette":
        RARE: tl.constexpr = 3 if FORMAT == "palette3" else 7 if FORMAT == "palette7" else 15
        tail = values_ptr + slot * stride_s + n.to(tl.int64) * stride_n + K // 64 * 96
        # Most rows have none or one. Entries that are not used come last, so the loop ends where no
        # row has one.
        number = 1
        entry = word_at(tail, 4, in_n)
        left = tl.max((entry != 0).to(tl.int32))
        while left != 0:
            used = in_x & (entry != 0)
            near = tl.load(x + ((entry >> 16) & 0xFFFF), mask=used, other=0.0).to(tl.float32)
            value = (entry << 16).to(tl.float32, bitcast=True)
            sums = tl.fma(tl.broadcast_to(value, sums.shape), near, sums)
            number += 1
            entry = word_at(tail, 4 * tl.minimum(number, RARE), in_n)
            left = tl.max((entry != 0).to(tl.int32)) * (number <= RARE)
    return sums
