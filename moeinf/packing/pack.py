"""`pack`: a checkpoint written again, its experts one after another, quantised where asked.

    new folder --> state file --> shard.part --> shard   (for each shard)
                                     |  an error, an interrupt, a full disk: the state file and
                                     |  the finished shards stay, and the same call goes on
                                     v
              other files, config.json last, state file removed

A shard gets its name once its bytes are on the disk. Before the call goes on, parts of each
finished shard are made again and compared.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moeinf.cache.budget import parse_bytes
from moeinf.checkpoint.folder import Checkpoint
from moeinf.errors import CapacityError, CheckpointError, UnsupportedError
from moeinf.output_files import replacing
from moeinf.packing.making import Result, check_shard, write_shard
from moeinf.packing.palettes import BF16_PALETTE
from moeinf.packing.plan import PackPlan
from moeinf.packing.quantised import Judged
from moeinf.packing.shards import write_index
from moeinf.packing.targets import TARGETS, check_dense
from moeinf.packing.writer import Disk

FORMATS = (*TARGETS, BF16_PALETTE)
STATE = ".moeinf-pack.json"
SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class PackReport:
    """What was written.

    format         of the experts; None where it is the source's
    dense          of the linear layers outside the experts; None where it is the source's
    resumed_bytes  in shards that an earlier call had finished
    weights        of a lossless pack: by matrix, its formats and in how many layers
    errors         by module of experts: relative error of the outputs of a few experts for random
                   inputs, and that of all linear layers; empty where nothing was rounded
    one_read       whether the bytes of each expert follow each other in one file
    """

    path: str
    format: str | None
    dense: str | None
    files: int
    source_bytes: int
    bytes: int
    resumed_bytes: int
    seconds: float
    errors: dict[str, float]
    weights: dict[str, str]
    one_read: bool


def pack(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    format: str | None = None,
    dense: str | None = None,
    revision: str | None = None,
    max_shard_size: str | int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """Writes a checkpoint into a new folder, with its experts one after another.

    The pack is a valid checkpoint of safetensors files, which transformers and other runtimes read
    too. All other tensors are copied as they are, unless `dense` is given. Call it again to go on
    after an interruption.

    Args:
        source: a checkpoint folder, or a name on the Hub.
        dest: a folder that does not exist, is empty, or holds an unfinished pack of this source.
        format: of the experts: one of `FORMATS`. Without it they stay as they are, to the bit,
            whatever format they are in. Experts with scales are not quantised again. Those of
            "bf16-palette" keep all bits of bf16 in 12 bits, and only this library reads them; they
            are read twice.
        dense: of the linear layers outside the experts, routers excepted: one of
            `packing.targets.DENSE`. "fp8" goes with experts in fp8, all others with each other.
            Layers that it cannot hold stay as they are.
        revision: branch, tag or commit on the Hub.
        max_shard_size: bytes of a file.
        progress: called with (bytes done, bytes in all). Where experts are read twice, each pass
            counts its own.

    Raises:
        ValueError: `dest` is not empty, or lies in `source`; or no such format, or `dense` does
            not go with it.
        CheckpointError, UnsupportedError: see `moeinf.load`; or experts that the format cannot
            hold, or that would be quantised twice.
        CapacityError: the disk has not the room.
        OSError: the disk is full, or cannot be read or written.
    """
    from moeinf.integrations.transformers.load import open_checkpoint

    start = time.perf_counter()
    if format is not None and format not in FORMATS:
        raise ValueError(f"no format is named {format!r}; there are: {', '.join(FORMATS)}")
    if dense is not None:
        check_dense(format, dense)
    dest = Path(dest)
    _check_folder(Path(source), dest)
    checkpoint = open_checkpoint(source, revision)
    if checkpoint.gguf is not None:
        raise UnsupportedError(f"{checkpoint.path}: expected safetensors files, found a GGUF file")
    _check_folder(checkpoint.path, dest)
    tell = progress or (lambda done, total: None)
    pack = PackPlan.of(checkpoint, format, dense, parse_bytes(max_shard_size), tell)
    pack.check_opens()
    state = _State.begin(dest, pack)
    with Disk(pack.largest) as disk:
        resumed = 0
        for shard in pack.shards:
            if shard.file in state.done:
                check_shard(dest / shard.file, shard, disk)
                resumed += shard.nbytes
        left = pack.nbytes - resumed
        free = shutil.disk_usage(dest).free
        free += sum(part.stat().st_size for part in dest.glob("*.part"))
        if left > free:
            raise CapacityError(f"{dest}: the pack needs {left:,} bytes more, {free:,} are free")
        done = resumed
        tell(done, pack.nbytes)
        for shard in pack.shards:
            if shard.file not in state.done:
                for result in write_shard(dest, shard, disk):
                    done += result.nbytes
                    state.add(result)
                    tell(done, pack.nbytes)
                state.finish(shard.file)
    write_index(dest, pack.shards)
    pack.write_small_files(dest)
    Checkpoint.open(dest)
    (dest / STATE).unlink()
    return PackReport(
        path=str(dest),
        format=format,
        dense=dense,
        files=len(pack.shards),
        source_bytes=pack.source_bytes,
        bytes=pack.nbytes,
        resumed_bytes=resumed,
        seconds=time.perf_counter() - start,
        errors={module: judged.error for module, judged in state.judged.items()},
        weights=pack.weights,
        one_read=pack.one_read,
    )


class _State:
    """The file that says how far a pack has come."""

    def __init__(self, path: Path, digest: str, done: list[str], judged: dict[str, Judged]):
        self.path, self.digest, self.done, self.judged = path, digest, done, judged

    @classmethod
    def begin(cls, dest: Path, pack: PackPlan) -> _State:
        """Takes up the state of an unfinished pack, or makes a folder with a new one."""
        path = dest / STATE
        dest.mkdir(parents=True, exist_ok=True)
        if path.exists():
            try:
                found = json.loads(path.read_text())
                judged = {name: Judged(*one) for name, one in found["judged"].items()}
                state = cls(path, found["digest"], list(found["done"]), judged)
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path}: is damaged: delete {dest}") from error
            if state.digest != pack.digest:
                raise CheckpointError(
                    f"{dest}: holds an unfinished pack of other files or another format: go on "
                    "with that, or delete the folder"
                )
            return state
        if any(dest.iterdir()):
            raise ValueError(f"{dest}: expected an empty folder, or none")
        state = cls(path, pack.digest, [], {})
        state._save()
        return state

    def add(self, result: Result) -> None:
        if result.judged is not None:
            self.judged[result.module] = self.judged.get(result.module, Judged()) + result.judged

    def finish(self, file: str) -> None:
        self.done.append(file)
        self._save()

    def _save(self) -> None:
        judged = {name: [one.change, one.size] for name, one in self.judged.items()}
        with replacing(self.path) as part:
            content = {"digest": self.digest, "done": self.done, "judged": judged}
            part.write_text(json.dumps(content))


def _check_folder(source: Path, dest: Path) -> None:
    """Before anything is read: a folder to write to, which is no part of the source."""
    if dest.exists() and not dest.is_dir():
        raise NotADirectoryError(f"{dest}: expected a folder, found a file")
    if source.is_dir() and dest.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{dest}: lies in {source}: write the pack to another folder")
    if dest.is_dir() and any(dest.iterdir()) and not (dest / STATE).exists():
        raise ValueError(f"{dest}: expected an empty folder, or none")
