"""A Hugging Face checkpoint folder as an index of tensors: which bytes of which file hold what."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moeinf.checkpoint import hub
from moeinf.checkpoint.config import check_counts, quantization
from moeinf.checkpoint.formats import MULTIPLIER
from moeinf.checkpoint.gguf import GgufFile, gguf_in, is_gguf, parts_of, read_gguf
from moeinf.checkpoint.headers import (
    TensorEntry,
    check_is_file,
    check_is_no_pointer,
    read_header,
)
from moeinf.checkpoint.integers import check_groups
from moeinf.checkpoint.packed import PackedEntry, join
from moeinf.checkpoint.packed_entry import tensors_of
from moeinf.errors import CheckpointError, ReadError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The configuration and the tensor index of one checkpoint folder. Holds no tensor data."""

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, TensorEntry]):
        if any("\ud800" <= one <= "\udfff" for one in str(path.absolute())):
            raise CheckpointError(
                f"{str(path.absolute())!a}: expected a path in UTF-8, as tokenizers need it: "
                "make a link to it"
            )
        self.path = path
        self.config = config
        self.tensors = tensors
        self.unread: list[TensorEntry] = []  # beside packed matrices, of no use here
        self.has_weights = True
        self.trust_remote_code = False
        self.gguf: GgufFile | None = None

    @classmethod
    def open(
        cls,
        path: str | bytes | os.PathLike[str],
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Checkpoint:
        """Reads `config.json` and the headers of every safetensors shard.

        Args:
            path: a folder, a GGUF file, or where there is none of that name, a repository on the
                Hub or a GGUF file of one, such as
                Qwen/Qwen3-30B-A3B-GGUF/Qwen3-30B-A3B-Q4_K_M.gguf.
            revision: branch, tag or commit on the Hub; without it, the main branch.
            trust_remote_code: code that comes with it may run.

        Raises:
            CheckpointError: a file is missing, damaged, or disagrees with another.
            ValueError: a revision of a folder.
        """
        name = os.fsdecode(path)
        folder = Path(name)
        if is_gguf(folder):
            return cls.of_gguf(_fetched(folder, revision))
        if (model := gguf_in(folder)) is not None:
            return cls.of_gguf(model)
        if not folder.is_dir():
            folder = hub.fetch(name, revision, with_code=trust_remote_code)
            missing = _missing(folder)
            if missing:
                hub.fetch(name, folder.name, missing)
        elif revision is not None:
            raise ValueError(f"{folder} is a folder: revision={revision!r} is for names on the Hub")
        return cls.of_folder(folder, trust_remote_code)

    @classmethod
    @contextmanager
    def peek(
        cls,
        path: str | bytes | os.PathLike[str],
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Iterator[Checkpoint]:
        """The same without fetching weights from the Hub; `has_weights` says if they are here."""
        name = os.fsdecode(path)
        if Path(name).is_dir() or is_gguf(Path(name)):
            yield cls.open(name, revision, trust_remote_code)
            return
        folder = hub.fetch(name, revision, with_code=trust_remote_code)
        missing = _missing(folder)
        if not missing:
            yield cls.of_folder(folder, trust_remote_code)
            return
        with hub.headers(name, folder, missing) as made:
            headers = cls.of_folder(made, trust_remote_code)
            headers.has_weights = False
            yield headers

    @classmethod
    def of_gguf(cls, path: Path) -> Checkpoint:
        """The same for a GGUF file, or for any part of a split one. Its keys are the configuration:
        here under the names that other configurations have for them."""
        file = read_gguf(path)
        keys = ("block_count", "expert_count", "expert_used_count", "embedding_length")
        names = ("num_hidden_layers", "num_experts", "num_experts_per_tok", "hidden_size")
        found = (file.metadata.get(f"{file.architecture}.{key}") for key in keys)
        config = {"model_type": file.architecture, **dict(zip(names, found, strict=True))}
        check_counts(config, file.tensors.values(), path)
        made = cls(file.path, config, file.tensors)
        made.gguf = file
        return made

    @classmethod
    def of_folder(cls, folder: Path, trust_remote_code: bool = False) -> Checkpoint:
        """The same for a folder that is there."""
        config = _read_json(folder / "config.json")
        if not quantization(config, folder / "config.json"):  # before the other files are looked at
            config |= _of_modelopt(folder / "hf_quant_config.json")
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
        check_counts(config, tensors.values(), folder / "config.json")
        made = cls(folder, config, join(tensors, config, folder / "config.json"))
        known = {one.name for entry in made.tensors.values() for one in tensors_of(entry)}
        made.unread = [entry for name, entry in tensors.items() if name not in known]
        made.trust_remote_code = trust_remote_code
        return made

    @property
    def config_file(self) -> Path:
        return self.path if self.gguf is not None else self.path / "config.json"

    def text_config(self) -> dict[str, Any]:
        """The part of the configuration that describes the language model."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config


def _fetched(file: Path, revision: str | None) -> Path:
    """A GGUF file, or where there is none, that file of a repository on the Hub."""
    repository = os.fspath(file.parent)
    if file.exists() or not hub.HUB_ID.fullmatch(repository):
        return file
    return hub.fetch(repository, revision, parts_of(file.name)) / file.name


def _read_json(path: Path) -> dict[str, Any]:
    check_is_file(path)
    try:
        raw = path.read_bytes()
        check_is_no_pointer(path, raw)
        value = json.loads(raw.decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def names_by_shard(folder: Path) -> dict[str, set[str]]:
    """The files of weights, with the names the index puts in each; none are known without it.

    A single file goes before an index, as in transformers.
    """
    index = folder / INDEX
    if (folder / SINGLE).exists() or not index.exists():
        return {SINGLE: set()}
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' is missing or empty")
    by_shard: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        # A shard is a plain file name: an index must not be able to point outside its folder.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: tensor {name!r} lies in {shard!r}, not a file name")
        by_shard.setdefault(shard, set()).add(name)
    return by_shard


def _of_modelopt(file: Path) -> dict[str, Any]:
    """The `quantization_config` that ModelOpt may write into a file of its own, else empty."""
    if not file.exists():
        return {}
    stated = _read_json(file).get("quantization")
    if not isinstance(stated, dict):
        raise CheckpointError(f"{file}: quantization is {stated!r}, expected an object")
    if stated.get("quant_algo") is None:  # what is quantised then is the cache of keys and values
        return {}
    return {"quantization_config": {**stated, "quant_method": "modelopt"}}


def _missing(folder: Path) -> list[str]:
    return [name for name in sorted(names_by_shard(folder)) if not (folder / name).exists()]


def _shards(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    for shard, names in sorted(names_by_shard(folder).items()):
        if not (folder / shard).exists() and not (folder / shard).is_symlink():
            raise CheckpointError(
                f"{folder / shard}: missing, though {INDEX} puts {len(names)} tensors in it"
                if names
                else f"{folder}: found neither {SINGLE} nor {INDEX}"
            )
        yield folder / shard, names


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """Reads one tensor into fresh memory, and leaves no second copy in the page cache.

    A packed matrix becomes float32.

    Raises:
        CheckpointError: torch has no such dtype.
        ReadError: the file is gone, short or unreadable, or holds NaN where no decoder has them.
    """
    if isinstance(entry, PackedEntry):
        return _dequantised(entry)
    dtype = entry.torch_dtype()
    return read_bytes(entry, entry.offset, entry.nbytes).view(dtype).view(entry.shape)


def read_pieces(entry: PackedEntry) -> dict[str, torch.Tensor]:
    """The pieces of packed matrices, as slots have them: [matrices, *shape] each.

    Raises:
        ReadError: see `read_tensor`.
        CheckpointError, UnsupportedError: multipliers or groups that cannot be served.
    """
    check_order(entry)
    *lead, rows, cols = entry.shape
    parts = {}
    for piece, (dtype, shape) in entry.format.segments(rows, cols).items():
        if piece == MULTIPLIER:
            parts[piece] = read_multipliers(entry).view(-1, 1)
        else:
            stored = entry.pieces[piece]
            raw = read_bytes(stored, stored.offset, stored.nbytes)
            if piece in entry.stored:
                how, matrices = entry.stored[piece], raw.view(math.prod(lead), -1)
                raw = torch.cat([how.read(one, stored.shape, rows) for one in matrices])
            parts[piece] = raw.view(dtype).view(-1, *shape)
    entry.format.refuse(parts, f"{entry.path}: {entry.name}")
    return parts


def _dequantised(entry: PackedEntry) -> torch.Tensor:
    """float32, matrix by matrix."""
    parts = read_pieces(entry)
    out = torch.empty(entry.shape)
    for i, matrix in enumerate(out.view(-1, *entry.shape[-2:])):
        own = {piece: part[i] for piece, part in parts.items()}
        for first, numbers in entry.format.dequantise_panels(own):
            matrix[first : first + len(numbers)] = numbers
    return out


def check_order(entry: TensorEntry) -> None:
    """Raises UnsupportedError for a packed matrix whose groups are not in the order of columns."""
    if isinstance(entry, PackedEntry) and entry.groups is not None:
        check_groups(entry, read_bytes(entry.groups, entry.groups.offset, entry.groups.nbytes))


def read_multipliers(entry: PackedEntry) -> torch.Tensor:
    """float32: the numbers by which packed matrices are multiplied, one or two for each matrix.

    Raises:
        CheckpointError: one is not a finite number above zero.
    """
    stored = entry.pieces[MULTIPLIER]
    raw = read_bytes(stored, stored.offset, stored.nbytes).view(stored.torch_dtype())
    numbers = raw.double().view(-1)
    bad = ~(numbers.isfinite() & (numbers > 0))
    if bad.any():
        raise CheckpointError(
            f"{stored.path}: {stored}: expected a number above zero, found {float(numbers[bad][0])}"
        )
    return (1 / numbers if entry.divides else numbers).float()


def read_bytes(entry: TensorEntry, offset: int, nbytes: int) -> torch.Tensor:
    """The same for a part of a tensor, uint8 [nbytes]; `offset` counts from the file's start."""
    tensor = torch.empty(nbytes, dtype=torch.uint8)
    read_into(entry, offset, tensor)
    return tensor


def read_into(entry: TensorEntry, offset: int, tensor: torch.Tensor) -> None:
    """Fills uint8 [n] with a part of a tensor; `offset` counts from the file's start."""
    nbytes = tensor.numel()
    view = tensor.numpy().data
    if entry.file.source is not None:
        entry.file.source.read(offset, view)
        return
    try:
        with entry.path.open("rb", buffering=0) as file:
            entry.file.check(os.fstat(file.fileno()))
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
