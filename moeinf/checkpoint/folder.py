"""A Hugging Face checkpoint folder as an index of tensors: which bytes of which file hold what."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moeinf.checkpoint.headers import TensorEntry, read_header
from moeinf.errors import CheckpointError, ReadError


class Checkpoint:
    """The configuration and the tensor index of one checkpoint folder. Holds no tensor data."""

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, TensorEntry]):
        self.path = path
        self.config = config
        self.tensors = tensors

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Reads `config.json` and the headers of every safetensors shard.

        Raises:
            CheckpointError: a file is missing, damaged, or disagrees with another.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: expected a checkpoint folder, found none")
        config = _read_json(folder / "config.json")
        tensors: dict[str, TensorEntry] = {}
        for shard, expected in _shards(folder):
            found = read_header(shard)
            missing = sorted(expected - found.keys())
            if missing:
                raise CheckpointError(
                    f"{shard}: the index says it holds {missing[0]!r}"
                    f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, it does not"
                )
            for name, entry in found.items():
                if name in tensors:
                    raise CheckpointError(
                        f"{shard}: tensor {name!r} is also in {tensors[name].path.name}"
                    )
                tensors[name] = entry
        return cls(folder, config, tensors)

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    def text_config(self) -> dict[str, Any]:
        """The part of the configuration that describes the language model."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def _shards(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """Each shard with the names the index puts in it (none are known without an index)."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():  # before an index, as transformers does
        yield single, set()
        return
    if not index.exists():
        raise CheckpointError(
            f"{folder}: found neither model.safetensors nor model.safetensors.index.json"
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' is missing or empty")
    by_shard: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        # A shard is a plain file name: an index must not be able to point outside its folder.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: tensor {name!r} lies in {shard!r}, not a file name")
        by_shard.setdefault(shard, set()).add(name)
    for shard, names in sorted(by_shard.items()):
        if not (folder / shard).exists():
            raise CheckpointError(
                f"{folder / shard}: missing, though {index.name} puts {len(names)} tensors in it"
            )
        yield folder / shard, names


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """Reads one tensor into fresh memory, and leaves no second copy in the page cache.

    Raises:
        CheckpointError: torch has no such dtype.
        ReadError: the file is gone, short or unreadable.
    """
    dtype = entry.torch_dtype()
    return read_bytes(entry, entry.offset, entry.nbytes).view(dtype).view(entry.shape)


def read_bytes(entry: TensorEntry, offset: int, nbytes: int) -> torch.Tensor:
    """The same for a part of a tensor, uint8 [nbytes]; `offset` counts from the file's start."""
    tensor = torch.empty(nbytes, dtype=torch.uint8)
    view = tensor.numpy().data
    try:
        with entry.path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise ReadError(
                        f"{entry.path}: {entry.name}: ends after {done} of {nbytes} bytes"
                    )
                done += count
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(f"{entry.path}: {entry.name}: {error.strerror or error}") from error
    return tensor
