"""The bytes of a shard, made a few at a time by several threads, and compared once it is there."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from moeinf.checkpoint.headers import TensorEntry
from moeinf.errors import CheckpointError
from moeinf.packing.linear import MODULE, QuantisedLinear
from moeinf.packing.quantised import Judged, StoredExpert
from moeinf.packing.shards import Copied, Shard
from moeinf.packing.writer import Disk, FileWriter, in_threads

BLOCK = 16 << 20  # bytes that one thread copies at a time
COPIERS, QUANTISERS = 4, 2  # threads; torch has threads of its own
CHECKED = 3  # parts of a finished shard that are made again


@dataclass(frozen=True)
class Result:
    nbytes: int
    module: str = ""
    judged: Judged | None = None


Runs = Iterator[tuple[int, torch.Tensor]]
Maker = Callable[[], tuple[Result, Runs]]


def write_shard(dest: Path, shard: Shard, disk: Disk) -> Iterator[Result]:
    """Writes one shard, and gives it its name once its bytes are on the disk."""
    part = dest / f"{shard.file}.part"
    writer = FileWriter(part, shard.nbytes)

    def write(maker: Maker) -> Result:
        result, runs = maker()
        for offset, data in runs:
            writer.write(offset, data)
        return result

    try:
        writer.write_small(0, shard.header)
        yield Result(len(shard.header))
        threads = COPIERS if isinstance(shard.parts[0], Copied) else QUANTISERS
        yield from in_threads([partial(write, one) for one in _makers(shard, disk)], threads)
        writer.sync()
    finally:
        writer.close()
    part.replace(dest / shard.file)


def _makers(shard: Shard, disk: Disk) -> list[Maker]:
    """What makes the bytes of a shard, a few at a time."""
    if isinstance(shard.parts[0], StoredExpert):
        return [partial(_quantise, shard, part, disk) for part in shard.parts]
    if isinstance(shard.parts[0], QuantisedLinear):
        return [
            partial(_quantise_rows, shard, part, first, disk)
            for part in shard.parts
            for first in range(0, part.entry.shape[0], part.step)
        ]
    entries = [(shard.places[e.name], e) for part in shard.parts for e in part.entries]
    entries.sort(key=lambda one: one[0])
    return [
        partial(_copy, entries, begin, min(begin + BLOCK, shard.nbytes), disk)
        for begin in range(shard.begin, shard.nbytes, BLOCK)
    ]


def _copy(
    entries: list[tuple[int, TensorEntry]], begin: int, end: int, disk: Disk
) -> tuple[Result, Runs]:
    """Bytes begin to end of a file that holds these tensors at these places."""
    data = disk.buffers.at(begin, end - begin)
    at = max(0, bisect_right(entries, begin, key=lambda one: one[0]) - 1)
    for place, entry in islice(entries, at, None):
        first, last = max(begin, place), min(end, place + entry.nbytes)
        if place >= end:
            break
        if first < last:
            part = data[first - begin : last - begin]
            disk.reader.read(entry, entry.offset + first - place, part)
    return Result(end - begin), iter([(begin, data)])


def _quantise(shard: Shard, part: StoredExpert, disk: Disk) -> tuple[Result, Runs]:
    """The runs of bytes of one expert."""
    made, judged = part.make()
    tensors = sorted((shard.places[name], tensor) for name, tensor in made.items())

    def runs() -> Runs:
        done = 0
        while done < len(tensors):
            begin = end = tensors[done][0]
            first = done
            while done < len(tensors) and tensors[done][0] == end:
                end += tensors[done][1].nbytes
                done += 1
            data = disk.buffers.at(begin, end - begin)
            for place, tensor in tensors[first:done]:
                raw = tensor.contiguous().view(-1).view(torch.uint8)
                data[place - begin :][: raw.numel()] = raw
            yield begin, data

    return Result(part.nbytes, part.module, judged), runs()


def _quantise_rows(
    shard: Shard, part: QuantisedLinear, first: int, disk: Disk
) -> tuple[Result, Runs]:
    """Some rows of a linear layer."""
    row_bytes = part.entry.nbytes // part.entry.shape[0]
    raw = torch.empty(min(part.step, part.entry.shape[0] - first) * row_bytes, dtype=torch.uint8)
    disk.reader.read(part.entry, part.entry.offset + first * row_bytes, raw)
    made, judged = part.make(first, raw)

    def runs() -> Runs:
        for name, (place, rows) in made.items():
            stored = rows.contiguous().view(-1).view(torch.uint8)
            data = disk.buffers.at(shard.places[name] + place, stored.numel())
            yield shard.places[name] + place, data.copy_(stored)

    nbytes = sum(rows.nbytes for _, rows in made.values())
    return Result(nbytes, MODULE, judged), runs()


def check_shard(path: Path, shard: Shard, disk: Disk) -> None:
    """Raises CheckpointError unless a finished shard has its header, its size, and the bytes that
    are made again for some of its parts."""
    wrong = CheckpointError(
        f"{path}: is not what an earlier call wrote: delete {path.parent} and begin again"
    )
    try:
        if path.stat().st_size != shard.nbytes:
            raise wrong
        with path.open("rb") as file:
            if file.read(shard.begin) != shard.header:
                raise wrong
            makers = _makers(shard, disk)
            for maker in makers[:: max(1, len(makers) // CHECKED)]:
                for offset, data in maker()[1]:
                    file.seek(offset)
                    if file.read(data.numel()) != data.numpy().data:
                        raise wrong
    except FileNotFoundError:
        raise wrong from None
