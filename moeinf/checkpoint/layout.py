"""How the tensors of one expert lie in a slot."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SLOT_ALIGNMENT = 4096  # a page: what direct reads and huge pages want
SEGMENT_ALIGNMENT = 256  # a GPU's widest loads, with room


@dataclass(frozen=True)
class Segment:
    """One named tensor of an expert: `nbytes` bytes from `offset`, counted from the slot."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The ordered segments of an expert; `slot_bytes` is their size rounded up to 4096."""

    segments: tuple[Segment, ...]

    @classmethod
    def build(cls, parts: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> Layout:
        """Lays out tensors of the given dtype and shape one after another, each aligned."""
        segments: list[Segment] = []
        offset = 0
        for name, (dtype, shape) in parts.items():
            segment = Segment(name, dtype, shape, offset)
            segments.append(segment)
            offset = _round_up(offset + segment.nbytes, SEGMENT_ALIGNMENT)
        return cls(tuple(segments))

    @property
    def slot_bytes(self) -> int:
        last = self.segments[-1]
        return _round_up(last.offset + last.nbytes, SLOT_ALIGNMENT)

    @property
    def nbytes(self) -> int:
        """Bytes of one expert, without padding."""
        return sum(segment.nbytes for segment in self.segments)

    def __getitem__(self, name: str) -> Segment:
        for segment in self.segments:
            if segment.name == name:
                return segment
        raise KeyError(f"{name!r}; this layout has {', '.join(s.name for s in self.segments)}")

    def views(self, pool: torch.Tensor) -> dict[str, torch.Tensor]:
        """Typed views of a pool, uint8 [slots, slot_bytes]: each segment as [slots, *shape]."""
        views = {}
        for segment in self.segments:
            flat = pool[:, segment.offset : segment.offset + segment.nbytes]
            views[segment.name] = flat.view(segment.dtype).unflatten(1, segment.shape)
        return views


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
