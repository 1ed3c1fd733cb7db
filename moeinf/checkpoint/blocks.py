"""The block formats of GGUF files: how the bytes of a block become numbers.

A row is blocks of 32 or of 256 elements, one after another. A block has its own scales: there are
none beside it. Each function takes blocks, uint8 [..., bytes], and returns float64 [..., elements].
`d` and `m` are float16 in the first bytes. A byte of two 4-bit codes holds an element of the first
half of its group in its lower half, and one of the second half in its upper half.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
IQ4_NL = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def _half(blocks: Tensor, first: int) -> Tensor:
    """The float16 that begins at byte `first`: float64 [..., 1]."""
    return blocks[..., first : first + 2].contiguous().view(torch.float16).double()


def _nibbles(stored: Tensor, group: int) -> Tensor:
    """Codes of 4 bits: each `group` bytes hold as many elements in their lower halves, and then as
    many in their upper halves."""
    parts = stored.unflatten(-1, (-1, group))
    return torch.stack([parts & 15, parts >> 4], -2).flatten(-3)


def q8_0(blocks: Tensor) -> Tensor:
    """d, 32 integers."""
    return _half(blocks, 0) * blocks[..., 2:].contiguous().view(torch.int8).double()


def q4_0(blocks: Tensor) -> Tensor:
    """d, 32 codes, which have 8 added."""
    return _half(blocks, 0) * (_nibbles(blocks[..., 2:], 16).double() - 8)


def q4_1(blocks: Tensor) -> Tensor:
    """d, m, which is added, 32 codes."""
    return _half(blocks, 0) * _nibbles(blocks[..., 4:], 16).double() + _half(blocks, 2)


def _fifth_bits(word: Tensor) -> Tensor:
    """Bit j of four bytes, 16 for 1, belongs to element j."""
    return torch.cat([(word[..., j // 8, None] >> j % 8 & 1) << 4 for j in range(32)], -1)


def q5_0(blocks: Tensor) -> Tensor:
    """d, the fifth bits, 32 codes, which have 16 added."""
    codes = _nibbles(blocks[..., 6:], 16) | _fifth_bits(blocks[..., 2:6])
    return _half(blocks, 0) * (codes.double() - 16)


def q5_1(blocks: Tensor) -> Tensor:
    """d, m, which is added, the fifth bits, 32 codes."""
    codes = _nibbles(blocks[..., 8:], 16) | _fifth_bits(blocks[..., 4:8])
    return _half(blocks, 0) * codes.double() + _half(blocks, 2)


def iq4_nl(blocks: Tensor) -> Tensor:
    """d, 32 places in a table."""
    table = torch.tensor(IQ4_NL, dtype=torch.float64, device=blocks.device)
    return _half(blocks, 0) * table[_nibbles(blocks[..., 2:], 16).long()]


def mxfp4(blocks: Tensor) -> Tensor:
    """The exponent of a power of two (255 is NaN), 32 floats of four bits."""
    exponent = blocks[..., :1].double()
    scale = torch.where(exponent == 255, torch.nan, torch.exp2(exponent - 127))
    numbers = E2M1 + [-value for value in E2M1]
    table = torch.tensor(numbers, dtype=torch.float64, device=blocks.device)
    return scale * table[_nibbles(blocks[..., 1:], 16).long()]


def iq4_xs(blocks: Tensor) -> Tensor:
    """d, scales of 8 groups of 32, 256 places in a table.

    Scale g has 32 added. Bits 2g and 2g + 1 of two bytes are its upper ones, half g of the next
    four bytes its lower ones.
    """
    word = blocks[..., 2].int() | (blocks[..., 3].int() << 8)
    high = torch.stack([(word >> 2 * g) & 3 for g in range(8)], -1)
    low = torch.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], -1).flatten(-2).int()
    scales = _half(blocks, 0) * ((low | (high << 4)).double() - 32)
    table = torch.tensor(IQ4_NL, dtype=torch.float64, device=blocks.device)
    numbers = table[_nibbles(blocks[..., 8:], 16).long()]
    return (scales.unsqueeze(-1) * numbers.unflatten(-1, (8, 32))).flatten(-2)


def _pairs(stored: Tensor) -> Tensor:
    """Codes of 2 bits: each 32 bytes hold 128 elements, 32 in each pair of bits."""
    parts = stored.unflatten(-1, (-1, 32))
    return torch.stack([(parts >> 2 * g) & 3 for g in range(4)], -2).flatten(-3)


def q2_k(blocks: Tensor) -> Tensor:
    """Scales (lower halves) and minima (upper halves) of 16 groups of 16, 256 codes, d, m."""
    scales = _half(blocks, 80) * (blocks[..., :16] & 15).double()
    minima = _half(blocks, 82) * (blocks[..., :16] >> 4).double()
    codes = _pairs(blocks[..., 16:80]).unflatten(-1, (16, 16)).double()
    return (scales.unsqueeze(-1) * codes - minima.unsqueeze(-1)).flatten(-2)


def q3_k(blocks: Tensor) -> Tensor:
    """The third bits of 256 codes, their lower two, 16 scales of 6 bits, d.

    Bit g of byte j belongs to element j of group g of 32. Codes have 4 added. Scales have 32 added:
    eight bytes hold the lower 4 bits of two each, four bytes the upper 2 bits of four.
    """
    high = torch.stack([(blocks[..., :32] >> g) & 1 for g in range(8)], -2).flatten(-2)
    codes = (_pairs(blocks[..., 32:96]) | (high << 2)).double() - 4
    low = torch.cat([blocks[..., 96:104] & 15, blocks[..., 96:104] >> 4], -1)
    upper = torch.cat([(blocks[..., 104:108] >> 2 * g) & 3 for g in range(4)], -1)
    scales = _half(blocks, 108) * ((low | (upper << 4)).double() - 32)
    return (scales.unsqueeze(-1) * codes.unflatten(-1, (16, 16))).flatten(-2)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [..., 8, 1] each: of the groups of 32, 6 bits each.

    The first four have the lower 6 bits of a byte. The others have 4 bits of bytes 8 to 11, and
    the upper 2 bits of the bytes of the first four.
    """
    first, second, last = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat([first & 63, (last & 15) | ((first >> 6) << 4)], -1)
    minima = torch.cat([second & 63, (last >> 4) | ((second >> 6) << 4)], -1)
    d, m = _half(blocks, 0), _half(blocks, 2)
    return (d * scales.double()).unsqueeze(-1), (m * minima.double()).unsqueeze(-1)


def q4_k(blocks: Tensor) -> Tensor:
    """d, m, scales and minima, 256 codes."""
    scales, minima = _scales_and_minima(blocks)
    codes = _nibbles(blocks[..., 16:], 32).unflatten(-1, (8, 32)).double()
    return (scales * codes - minima).flatten(-2)


def q5_k(blocks: Tensor) -> Tensor:
    """The same with a fifth bit: bit g of byte j belongs to element j of group g."""
    scales, minima = _scales_and_minima(blocks)
    high = torch.stack([(blocks[..., 16:48] >> g) & 1 for g in range(8)], -2)
    codes = _nibbles(blocks[..., 48:], 32).unflatten(-1, (8, 32)) | (high << 4)
    return (scales * codes.double() - minima).flatten(-2)


def q6_k(blocks: Tensor) -> Tensor:
    """256 lower halves of codes, their 2 upper bits, 16 scales, d. The codes have 32 added."""
    low = _nibbles(blocks[..., :128], 64)
    pairs = blocks[..., 128:192].unflatten(-1, (2, 32))
    high = torch.stack([(pairs >> 2 * g) & 3 for g in range(4)], -2).flatten(-3)
    codes = (low | (high << 4)).double() - 32
    scales = _half(blocks, 208) * blocks[..., 192:208].contiguous().view(torch.int8).double()
    return (scales.unsqueeze(-1) * codes.unflatten(-1, (16, 16))).flatten(-2)


# Name of the format: elements and bytes of a block, and its decoder.
BLOCKS: dict[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "q8_0": (32, 34, q8_0),
    "q4_0": (32, 18, q4_0),
    "q4_1": (32, 20, q4_1),
    "q5_0": (32, 22, q5_0),
    "q5_1": (32, 24, q5_1),
    "iq4_nl": (32, 18, iq4_nl),
    "mxfp4": (32, 17, mxfp4),
    "iq4_xs": (256, 136, iq4_xs),
    "q2_k": (256, 84, q2_k),
    "q3_k": (256, 110, q3_k),
    "q4_k": (256, 144, q4_k),
    "q5_k": (256, 176, q5_k),
    "q6_k": (256, 210, q6_k),
}


# Where the numbers of a block are that may not be NaN or infinite: byte and type.
NUMBERS: dict[str, tuple[tuple[int, str], ...]] = {
    "q8_0": ((0, "f16"),),
    "q4_0": ((0, "f16"),),
    "q4_1": ((0, "f16"), (2, "f16")),
    "q5_0": ((0, "f16"),),
    "q5_1": ((0, "f16"), (2, "f16")),
    "iq4_nl": ((0, "f16"),),
    "mxfp4": ((0, "e8m0"),),
    "iq4_xs": ((0, "f16"),),
    "q2_k": ((80, "f16"), (82, "f16")),
    "q3_k": ((108, "f16"),),
    "q4_k": ((0, "f16"), (2, "f16")),
    "q5_k": ((0, "f16"), (2, "f16")),
    "q6_k": ((208, "f16"),),
}


def decode_rows(name: str) -> Callable[[Tensor], Tensor]:
    """From stored rows, uint8 [rows, bytes], to float64 [rows, elements]."""
    _, size, decode = BLOCKS[name]
    return lambda rows: decode(rows.unflatten(-1, (-1, size))).flatten(-2)
