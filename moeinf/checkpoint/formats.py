"""How weights are stored: one row of FORMATS for each weight format.

A row says which segments a matrix has and how they become numbers. The checkpoint, the layout and
the tests read it. The fast decoders stand beside it, under the same name: one header in
csrc/compute/formats/ for the CPU, one tile loader in kernels/formats.py for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

# The pieces of a matrix, in the order in which they lie in a slot.
VALUES, SCALES, BIAS = "values", "scales", "bias"
PLAIN_SUFFIXES = {".weight": VALUES, "": VALUES}
BIAS_SUFFIXES = {".bias": BIAS, "_bias": BIAS}  # of every format: a bias is no part of the weights


@dataclass(frozen=True)
class WeightFormat:
    """One way to store a matrix of `rows` outputs and `cols` inputs, row by row.

    name      the same word on the CPU, on the GPU and here
    values    dtype of the stored values
    pack      elements of a row in one stored value
    block     (rows, cols) that share one scale, or None; blocks at the edges may be smaller
    scales    dtype of the scales, or None. An element is its decoded value times its scale
    suffixes  end of a tensor's name in a checkpoint -> the piece it holds
    decode    stored values [rows, stored] -> float64 [rows, stored * pack]
    """

    name: str
    values: torch.dtype
    pack: int = 1
    block: tuple[int, int] | None = None
    scales: torch.dtype | None = None
    suffixes: Mapping[str, str] = field(default_factory=lambda: PLAIN_SUFFIXES, hash=False)
    decode: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double

    def segments(self, rows: int, cols: int) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
        """Piece -> dtype and shape, in slot order."""
        if cols % self.pack:
            raise ValueError(f"{self.name}: expected a multiple of {self.pack} columns, got {cols}")
        pieces = {VALUES: (self.values, (rows, cols // self.pack))}
        if self.block is not None and self.scales is not None:
            grid = (-(-rows // self.block[0]), -(-cols // self.block[1]))
            pieces[SCALES] = (self.scales, grid)
        return pieces

    def dequantise(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float64 [rows, cols] of the pieces of one matrix. Slow: the reference of every test."""
        numbers = self.decode(parts[VALUES])
        if self.block is None:
            return numbers
        rows, cols = numbers.shape
        scales = parts[SCALES].double()
        spread = scales.repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)
        return numbers * spread[:rows, :cols]


FORMATS = {
    row.name: row
    for row in (
        WeightFormat("bf16", torch.bfloat16),
        WeightFormat("f16", torch.float16),
        WeightFormat("f32", torch.float32),
    )
}

# Formats without scales or packing, by the dtype that a checkpoint's header says.
PLAIN_FORMATS = {row.values: row for row in FORMATS.values() if row.block is None and row.pack == 1}
