"""bf16 weights in about 12 bits, without loss: the exponents as codes, the rest as it is.

The exponents of a row's weights lie close together. A row has a base exponent, and a code of 4 bits
adds 0 to 14 to it. Code 15 is the exponent 0, so that a weight of 0 needs no exponent of the
window. The few weights that have another exponent are rare ones: the tail of the row lists them.

A row is blocks of 96 bytes for 64 columns, and then the tail.

    block   32 bytes of codes: byte i has column i in its lower half and column 32 + i in its upper
            half. 64 bytes of signs (bit 7) and fractions (bits 0 to 6), one for each column
    tail    byte 0 is the base exponent, bytes 1 to 3 are 0. Then one uint32 for each rare weight:
            its column times 65536 plus its bits, in rising order, and 0 where none is left

The place of a rare weight holds code 15 and a byte of 0. So a row is expanded first and then
patched, or a kernel adds the products of the rare weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeinf.errors import ReadError

COLUMNS, BLOCK_BYTES = 64, 96
MOST_COLUMNS = 1 << 16  # that an entry of the tail can name
WINDOW = 15  # exponents that have a code
ZERO = 15  # the code of exponent 0
MOST_BASE = 255 - (WINDOW - 1)
RARE = (3, 7, 15)  # rare weights that a row may have, by format


def tail_bytes(rare: int) -> int:
    return 4 + 4 * rare


def split_rows(stored: Tensor, tail: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """uint8 [rows, bytes] as int64: codes [rows, cols], signs and fractions [rows, cols], the first
    four bytes of the tail [rows, 4], and its entries [rows, rare]."""
    blocks = stored[:, : stored.shape[1] - tail].unflatten(1, (-1, BLOCK_BYTES)).long()
    codes = torch.cat([blocks[..., :32] & 15, blocks[..., :32] >> 4], -1)
    ends = stored[:, stored.shape[1] - tail :].long()
    entries = sum(ends[:, 4 + i :: 4] << 8 * i for i in range(4))
    assert isinstance(entries, Tensor)
    return codes.flatten(1), blocks[..., 32:].flatten(1), ends[:, :4], entries


def bits_of(stored: Tensor, tail: int) -> Tensor:
    """uint8 [rows, bytes] -> the bits of the weights, int64 [rows, cols]."""
    codes, bytes_, head, entries = split_rows(stored, tail)
    exponents = torch.where(codes == ZERO, 0, head[:, :1] + codes)
    bits = (bytes_ & 128) << 8 | exponents << 7 | bytes_ & 127
    row, entry = (entries != 0).nonzero(as_tuple=True)
    found = entries[row, entry]
    bits[row, found >> 16] = found & 0xFFFF
    return bits


def as_bf16(bits: Tensor) -> Tensor:
    """The numbers that have these bits."""
    return torch.where(bits < 1 << 15, bits, bits - (1 << 16)).to(torch.int16).view(torch.bfloat16)


def decode_rows(rare: int) -> Callable[[Tensor], Tensor]:
    """From stored rows, uint8 [rows, bytes], to float64 [rows, cols]."""
    return lambda rows: as_bf16(bits_of(rows, tail_bytes(rare))).double()


def refuse(stored: Tensor, tail: int, name: str, first: int) -> None:
    """Raises ReadError for a malformed row. `first` is the number of the first one."""
    codes, bytes_, head, entries = split_rows(stored, tail)
    cols = codes.shape[1]
    used, columns = entries != 0, entries >> 16
    rising = (columns[:, 1:] > columns[:, :-1]) | ~used[:, 1:]
    at = columns.clamp(max=cols - 1)
    taken = used & ((codes.gather(1, at) != ZERO) | (bytes_.gather(1, at) != 0))
    rules = (
        (head[:, 0] > MOST_BASE, f"a base exponent of at most {MOST_BASE}"),
        ((head[:, 1:] != 0).any(1), "three bytes of 0 after the base exponent"),
        ((used & (columns >= cols)).any(1), f"rare weights in columns below {cols}"),
        ((used[:, 1:] & ~used[:, :-1]).any(1) | ~rising.all(1), "rare weights in rising columns"),
        (taken.any(1), "a zero in the place of each rare weight"),
    )
    bad = torch.stack([broken for broken, _ in rules])
    for row in bad.any(0).nonzero()[:1, 0].tolist():
        wanted = next(wanted for broken, wanted in rules if broken[row])
        found = stored[row, stored.shape[1] - tail :].numpy().tobytes().hex()
        raise ReadError(f"{name}, row {first + row}: expected {wanted}, found {found}")


def bases(weights: Tensor) -> tuple[Tensor, Tensor]:
    """For bf16 [rows, cols]: the base exponent of each row, which leaves the fewest rare weights,
    and their number."""
    rows = len(weights)
    size = weights.view(torch.int16) & 0x7FFF
    place = (size >> 7) + torch.arange(0, 256 * rows, 256, dtype=torch.int32)[:, None]
    counts = torch.bincount(place.view(-1), minlength=256 * rows).view(rows, 256)
    counts[:, 0] -= (size == 0).sum(1)  # which need no exponent
    sums = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    inside = sums[:, WINDOW:] - sums[:, :-WINDOW]  # for each base
    most, base = inside[:, :MOST_BASE].max(1)  # the highest window would hold infinities
    return base, sums[:, -1] - most


def encode(weights: Tensor, base: Tensor, rare: int) -> Tensor:
    """bf16 [rows, cols] -> uint8 [rows, bytes] for rows of at most `rare` rare weights."""
    rows, cols = weights.shape
    bits = weights.view(torch.int16)
    size = bits & 0x7FFF
    zero = size == 0
    codes = (size >> 7).sub_(base.short()[:, None])
    outside = ((codes < 0) | (codes >= WINDOW)) & ~zero
    codes = codes.masked_fill_(zero | outside, ZERO).to(torch.uint8).view(rows, -1, COLUMNS)
    rest = ((bits & 127) | (bits >> 8 & 128)).to(torch.uint8).masked_fill_(outside, 0)
    stored = torch.zeros(rows, cols // COLUMNS * BLOCK_BYTES + tail_bytes(rare), dtype=torch.uint8)
    blocks = stored[:, : -tail_bytes(rare)].unflatten(1, (-1, BLOCK_BYTES))
    blocks[..., :32] = codes[..., :32] | codes[..., 32:] << 4
    blocks[..., 32:] = rest.view(rows, -1, COLUMNS)
    entries = torch.zeros(rows, 1 + rare, dtype=torch.int32)
    entries[:, 0] = base
    row, column = outside.nonzero(as_tuple=True)
    number = torch.arange(len(row)) - torch.searchsorted(row, row)  # among those of its row
    entries[row, 1 + number] = (column << 16 | bits[row, column].long() & 0xFFFF).to(torch.int32)
    stored[:, -tail_bytes(rare) :] = entries.view(torch.uint8)
    return stored
