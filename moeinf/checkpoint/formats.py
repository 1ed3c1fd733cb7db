"""How weights are stored: one row of FORMATS for each kind of values.

A row says which segments a matrix has and how they become numbers. The checkpoint, the layout and
the tests read it. The fast decoders stand beside it, under the same name: one header in
csrc/cpu_kernels/formats/ for the CPU, one tile loader in kernels/formats.py for the GPU.

A matrix of a row with `scaled` may have scales, one for each block of its elements, and one
multiplier for all of them. Integers may have a zero point beside each scale. They are no part of
the row: see `with_scales`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from moeinf.checkpoint import palette
from moeinf.checkpoint.blocks import BLOCKS, E2M1, NUMBERS, decode_rows
from moeinf.errors import ReadError

# The pieces of a matrix, in the order in which they lie in a slot.
VALUES, SCALES, ZEROS, MULTIPLIER, BIAS = "values", "scales", "zeros", "multiplier", "bias"
PLAIN_SUFFIXES = {".weight": VALUES, "": VALUES}
BIAS_SUFFIXES = {".bias": BIAS, "_bias": BIAS}  # of every format: a bias is no part of the weights
PANEL = 1 << 18  # stored values of which float64 numbers, and copies of them, are held at a time

# How scales are stored, by the name that the core has for it. e8m0 is a power of two in a byte.
SCALE_TYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "e8m0": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
}


def numbers_of(scales: torch.Tensor) -> torch.Tensor:
    """Stored scales as float64. A byte is the exponent of a power of two; 255 is NaN."""
    if scales.dtype != torch.uint8:
        return scales.double()
    return torch.where(scales == 255, torch.nan, torch.exp2(scales.double() - 127))


@dataclass(frozen=True)
class WeightFormat:
    """One way to store a matrix of `rows` outputs and `cols` inputs, row by row.

    name        the same word on the CPU, on the GPU and here
    values      dtype of the stored values
    pack        elements of a row in one stored value, or in one block of stored values
    unit        stored values in a block
    tail        stored values after the last block of a row
    scaled      whether a matrix may have scales and a multiplier
    block       (rows, cols) that share one scale, or None; 0 columns are all columns. Blocks at the
                edges may be smaller
    scales      how scales are stored, one of SCALE_TYPES, or None
    zeros       whether an int8 for each block is subtracted from its integers before scaling
    multiplier  whether the whole matrix has one more scale, a float32
    signed      whether scales may be negative: quantisers of integers may turn the sign of a group
    suffixes    end of a tensor's name in a checkpoint -> the piece it holds
    decode      stored values [rows, stored] -> float64 [rows, elements]
    """

    name: str
    values: torch.dtype
    pack: int = 1
    unit: int = 1
    tail: int = 0
    scaled: bool = False
    block: tuple[int, int] | None = None
    scales: str | None = None
    zeros: bool = False
    multiplier: bool = False
    signed: bool = False
    suffixes: Mapping[str, str] = field(default_factory=lambda: PLAIN_SUFFIXES, hash=False)
    decode: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double

    def with_scales(
        self,
        scales: str | None,
        block: tuple[int, int] | None,
        *,
        multiplier: bool = False,
        zeros: bool = False,
    ) -> WeightFormat:
        """The same values with scales of one kind."""
        return replace(self, scales=scales, block=block, multiplier=multiplier, zeros=zeros)

    def segments(self, rows: int, cols: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Piece -> dtype and shape, in slot order."""
        if cols % self.pack:
            raise ValueError(f"{self.name}: expected a multiple of {self.pack} columns, got {cols}")
        if self.tail and cols > palette.MOST_COLUMNS:
            raise ValueError(
                f"{self.name}: expected at most {palette.MOST_COLUMNS} columns, got {cols}"
            )
        pieces: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            VALUES: (self.values, (rows, cols // self.pack * self.unit + self.tail))
        }
        if self.block is not None and self.scales is not None:
            grid = (-(-rows // self.block[0]), -(-cols // (self.block[1] or cols)))
            pieces[SCALES] = (SCALE_TYPES[self.scales], grid)
            if self.zeros:
                pieces[ZEROS] = (torch.int8, grid)
        if self.multiplier:
            pieces[MULTIPLIER] = (torch.float32, (1,))
        return pieces

    def cols(self, stored: int) -> int:
        """Elements of a row of that many stored values."""
        return (stored - self.tail) // self.unit * self.pack

    def number_types(self) -> dict[str, tuple[str, bool]]:
        """Piece -> type and sign of the numbers that must be finite. A decoder has no NaN.

        Zero is a good scale: that of a block of zeros.
        """
        types = {}
        if self.values == torch.float8_e4m3fn:
            types[VALUES] = "e4m3", True
        if self.scales is not None:
            types[SCALES] = self.scales, self.signed
        return types

    def refuse(self, parts: Mapping[str, torch.Tensor], name: str) -> None:
        """Raises ReadError for NaN, for infinities, for a sign where there may be none, and for a
        malformed row."""
        for piece, (_, negative) in self.number_types().items():
            for stored in _panels(parts[piece]):
                numbers = numbers_of(stored) if piece == SCALES else stored.double()
                _refuse(numbers, negative, f"{name}: {piece}")
        if self.zeros and self.pack == 2:
            far = parts[ZEROS][(parts[ZEROS] < -8) | (parts[ZEROS] > 7)]
            if len(far):
                raise ReadError(
                    f"{name}: {ZEROS}: expected zero points from -8 to 7, found {int(far[0])}"
                )
        for place, kind in NUMBERS.get(self.name, ()):
            dtype = SCALE_TYPES[kind]
            for stored in _panels(parts[VALUES]):
                blocks = stored.unflatten(-1, (-1, self.unit))
                numbers = blocks[..., place : place + dtype.itemsize].contiguous().view(dtype)
                _refuse(numbers_of(numbers), True, f"{name}: {VALUES}")
        if self.tail:
            row = 0
            for stored in _panels(parts[VALUES]):
                palette.refuse(stored, self.tail, f"{name}: {VALUES}", row)
                row += len(stored)

    def dequantise(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float64 [rows, cols] of the pieces of one matrix. Slow: the reference of every test."""
        numbers = self.decode(parts[VALUES])
        rows, cols = numbers.shape
        if self.block is not None:
            high, wide = self.block[0], self.block[1] or cols

            def spread(blocks: torch.Tensor) -> torch.Tensor:
                every = blocks.repeat_interleave(min(high, rows), 0).repeat_interleave(wide, 1)
                return every[:rows, :cols]

            if self.zeros:
                numbers = numbers - spread(parts[ZEROS].double())
            numbers = numbers * spread(numbers_of(parts[SCALES]))
        return numbers * parts[MULTIPLIER].double() if self.multiplier else numbers

    def dequantise_panels(
        self, parts: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The same, some rows at a time: the first row, and float64 [some, cols]."""
        values = parts[VALUES]
        high = 1 if self.block is None else self.block[0]
        step = max(PANEL // values.shape[1], 1)
        step -= step % high if step > high else 0  # whole blocks, or rows of one block
        first = 0
        while first < len(values):
            end = min(first + step, first - first % high + max(step, high), len(values))
            panel = {VALUES: values[first:end]}
            for piece in {SCALES, ZEROS} & parts.keys():
                panel[piece] = parts[piece][first // high : -(-end // high)]
            if self.multiplier:
                panel[MULTIPLIER] = parts[MULTIPLIER]
            yield first, self.dequantise(panel)
            first = end


def _panels(stored: torch.Tensor) -> Iterator[torch.Tensor]:
    """[..., n] as [rows, n], some rows at a time."""
    rows = stored.reshape(-1, stored.shape[-1])
    yield from rows.split(max(PANEL // max(rows.shape[1], 1), 1))


def _refuse(numbers: torch.Tensor, negative: bool, name: str) -> None:
    bad = ~numbers.isfinite() | (False if negative else numbers < 0)
    if bad.any():
        wanted = "finite numbers" + ("" if negative else ", none of them negative")
        raise ReadError(f"{name}: expected {wanted}, found {float(numbers[bad][0])}")


def nibbles(values: torch.Tensor, table: list[float]) -> torch.Tensor:
    """uint8 [rows, stored] -> float64 [rows, 2 * stored]: the lower half of a byte is the first."""
    codes = torch.stack([values & 15, values >> 4], -1).flatten(-2)
    return torch.tensor(table, dtype=torch.float64, device=values.device)[codes.long()]


FORMATS = {
    row.name: row
    for row in (
        WeightFormat("bf16", torch.bfloat16),
        WeightFormat("f16", torch.float16),
        WeightFormat("f32", torch.float32),
        WeightFormat("e4m3", torch.float8_e4m3fn, scaled=True),
        WeightFormat(
            "e2m1", torch.uint8, pack=2, scaled=True,
            decode=lambda values: nibbles(values, E2M1 + [-value for value in E2M1]),
        ),
        WeightFormat("int8", torch.int8, scaled=True, signed=True),
        WeightFormat(
            "int4", torch.uint8, pack=2, scaled=True, signed=True,
            decode=lambda values: nibbles(values, [float(code - 8) for code in range(16)]),
        ),
        *(
            WeightFormat(name, torch.uint8, pack=pack, unit=unit, decode=decode_rows(name))
            for name, (pack, unit, _) in BLOCKS.items()
        ),
        *(
            WeightFormat(
                f"palette{rare}", torch.uint8, pack=palette.COLUMNS, unit=palette.BLOCK_BYTES,
                tail=palette.tail_bytes(rare),
                decode=palette.decode_rows(rare),
            )
            for rare in palette.RARE
        ),
    )
}  # fmt: skip

# Formats without scales or packing, by the dtype that a checkpoint's header says.
PLAIN_FORMATS = {
    row.values: row for row in FORMATS.values() if row.values.is_floating_point and not row.scaled
}
