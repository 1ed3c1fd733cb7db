"""Weights that lie in several tensors, as one entry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from moeinf.checkpoint.formats import VALUES, WeightFormat
from moeinf.checkpoint.headers import TensorEntry
from moeinf.checkpoint.stored import Stored


@dataclass(frozen=True, slots=True)
class PackedEntry(TensorEntry):
    """A matrix, or the matrices of all experts, by its logical shape [..., rows, columns].

    `offset` and `nbytes` are of the stored values. `dtype` is a word for the format.
    divides: the multiplier in the file is what the values are divided by.
    stored: how the file holds the pieces that are otherwise in a slot.
    groups: the group of each column, which must be in their order: see `check_groups`.
    """

    format: WeightFormat
    pieces: Mapping[str, TensorEntry] = field(hash=False)
    divides: bool = False
    stored: Mapping[str, Stored] = field(default_factory=dict, hash=False)
    groups: TensorEntry | None = None

    def row_bytes(self) -> int:
        return self.nbytes // math.prod(self.shape[:-1])


def tensors_of(entry: TensorEntry) -> list[TensorEntry]:
    """The tensors of the files that an entry is made of."""
    if not isinstance(entry, PackedEntry):
        return [entry]
    return [*entry.pieces.values(), *([entry.groups] if entry.groups is not None else [])]


def make_entry(
    name: str,
    row: WeightFormat,
    shape: tuple[int, ...],
    pieces: Mapping[str, TensorEntry],
    divides: bool = False,
    stored: Mapping[str, Stored] | None = None,
    groups: TensorEntry | None = None,
) -> PackedEntry:
    values = pieces[VALUES]
    blocks = "" if row.block is None else f" / {row.scales} {row.block[0]}x{row.block[1] or 'all'}"
    number = (" / number" if divides else " * number") if row.multiplier else ""
    zeros = " - zeros" if row.zeros else ""
    how = "".join(f", {piece} {one}" for piece, one in (stored or {}).items())
    word = f"{row.name}{zeros}{blocks}{number}{how}"
    return PackedEntry(
        name, values.file, word, shape, values.offset, values.nbytes, row, pieces, divides,
        stored or {}, groups,
    )  # fmt: skip
