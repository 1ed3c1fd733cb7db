"""Where every tensor of a pack lies: the order of experts, the files, and their headers.

A file of experts begins at a page, and one expert follows another: all pieces of an expert, in the
order of a slot, are one run of bytes, so that one read fills a slot. Safetensors allows no holes
between tensors. So experts whose size is a multiple of a page all begin at a page, and those of
another size follow each other without a gap.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from moeinf.checkpoint.folder import INDEX
from moeinf.checkpoint.headers import DTYPE_NAMES, TensorEntry
from moeinf.packing.writer import PAGE


@dataclass(frozen=True)
class Spec:
    """A tensor to write; `width` is the bytes of one element."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    width: int

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Spec:
        nbytes = dtype.itemsize * int(torch.Size(shape).numel())
        return cls(name, DTYPE_NAMES[dtype], shape, nbytes, dtype.itemsize)

    @classmethod
    def copy_of(cls, entry: TensorEntry) -> Spec:
        width = max(1, (entry.bits or 8) // 8)
        return cls(entry.name, entry.dtype, entry.shape, entry.nbytes, width)


class Part:
    """What stays together in one file: an expert, or a tensor. `small` tensors lie behind all
    parts of the file, for they are read once and not with an expert."""

    specs: Sequence[Spec]
    small: Sequence[Spec] = ()

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in (*self.specs, *self.small))


@dataclass(frozen=True)
class Copied(Part):
    """Tensors of the source, byte by byte."""

    entries: tuple[TensorEntry, ...]

    @property
    def specs(self) -> Sequence[Spec]:  # type: ignore[override]
        return [Spec.copy_of(entry) for entry in self.entries]


@dataclass
class Shard:
    """One file. `places` are offsets from its start, by tensor; `begin` is that of the first."""

    file: str
    parts: list[Any]
    header: bytes = b""
    begin: int = 0
    nbytes: int = 0
    places: dict[str, int] = field(default_factory=dict)

    def lay_out(self) -> None:
        """Gives every tensor its place.

        An element must lie at a multiple of its size. Where a matrix of an odd size comes before
        wider elements, all tensors of the file are sorted by the size of their elements instead.
        """
        specs = [spec for part in self.parts for spec in part.specs]
        small = [spec for part in self.parts for spec in part.small]
        specs += sorted(small, key=lambda spec: -spec.width)
        if not _aligned(specs):
            specs.sort(key=lambda spec: -spec.width)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for spec in specs:
            begin, end = end, end + spec.nbytes
            self.places[spec.name] = begin
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": spec.shape,
                "data_offsets": [begin, end],
            }
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(8 + len(raw)) % PAGE)
        self.header = len(raw).to_bytes(8, "little") + raw
        self.begin, self.nbytes = len(self.header), len(self.header) + end
        self.places = {name: self.begin + place for name, place in self.places.items()}

    def in_runs(self) -> bool:
        """Whether the tensors of each part follow each other."""
        return all(
            self.places[one.name] + one.nbytes == self.places[after.name]
            for part in self.parts
            for one, after in pairwise(part.specs)
        )

    def write_hole(self, folder: Path) -> None:
        """The file as those see it who read headers alone."""
        with (folder / self.file).open("wb") as file:
            file.write(self.header)
            file.truncate(self.nbytes)


def _aligned(specs: Iterable[Spec]) -> bool:
    end = 0
    for spec in specs:
        if end % spec.width:
            return False
        end += spec.nbytes
    return True


def split(groups: Iterable[Sequence[Part]], most: int) -> list[Shard]:
    """Files of at most `most` bytes, or of one larger part. Each group begins a new file."""
    files: list[list[Part]] = []
    for group in groups:
        room = 0
        for part in group:
            if part.nbytes > room:
                files.append([])
                room = most
            files[-1].append(part)
            room -= part.nbytes
    shards = [
        Shard(f"model-{number:05d}-of-{len(files):05d}.safetensors", parts)
        for number, parts in enumerate(files, 1)
    ]
    for shard in shards:
        shard.lay_out()
    return shards


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """The index file, which says what lies in which file."""
    total = sum(shard.nbytes - shard.begin for shard in shards)
    weight_map = {name: shard.file for shard in shards for name in shard.places}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
