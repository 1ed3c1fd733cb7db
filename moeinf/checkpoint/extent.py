"""Where bytes of an expert lie, and where they go."""

from __future__ import annotations

from dataclasses import dataclass

from moeinf.checkpoint.headers import TensorEntry


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes of one expert: where it lies in a file, and where in the slot it goes."""

    entry: TensorEntry
    file_offset: int  # bytes from the start of the file
    nbytes: int
    slot_offset: int
