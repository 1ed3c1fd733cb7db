"""Reads the header of a safetensors file and trusts nothing in it.

The `safetensors` library hands out tensors. The cache needs byte ranges, so that experts can be
read straight into slots. Only the header is read here. Each length, shape and offset is checked
against the others and against the file's size: what the library refuses is refused here too, with
one exception. A dtype that is not in DTYPES refuses nothing until its tensor is wanted, so that a
new dtype of a tensor that nobody reads does not keep a checkpoint from being served.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from moeinf import _core
from moeinf.errors import CheckpointError, ReadError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_SIZE = 2**64 - 1  # sizes, offsets and counts of bits are 64-bit numbers there
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
FIELDS = ("dtype", "shape", "data_offsets")
FIELDS_SET = frozenset(FIELDS)

# dtype: (bits of one element, name of the torch dtype). Torch packs dtypes below 8 bits in shapes
# of its own, and older versions of torch lack some of the others.
DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}

DTYPE_NAMES: dict[torch.dtype, str] = {
    getattr(torch, name): dtype
    for dtype, (_, name) in DTYPES.items()
    if name is not None and hasattr(torch, name)
}


@dataclass(frozen=True, slots=True)
class FileState:
    """The state in which a file was when its header was read."""

    path: Path
    nbytes: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path, status: os.stat_result) -> FileState:
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ino)

    def check(self, status: os.stat_result) -> None:
        """Raises ReadError if the file is in another state now."""
        if FileState.of(self.path, status) != self:
            found = "replaced" if status.st_ino != self.inode else "written to"
            raise ReadError(f"{self.path}: was {found} after the checkpoint was opened")

    def check_path(self) -> None:
        """The same for what is at the path now; ReadError also where nothing is."""
        try:
            self.check(self.path.stat())
        except FileNotFoundError as error:
            raise ReadError(f"{self.path}: is gone") from error

    @property
    def source(self) -> _core.ByteSource | None:
        """Where the bytes come from, if from no file."""
        return None


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of one file: `nbytes` bytes from `offset` (counted from the start of the file).

    `dtype` is the file's own name; `bits` is the size of one element, None for a dtype that is not
    in DTYPES.
    """

    name: str
    file: FileState
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def bits(self) -> int | None:
        known = DTYPES.get(self.dtype)
        return known[0] if known else None

    def torch_dtype(self) -> torch.dtype:
        """Raises CheckpointError where this torch has no such dtype."""
        _, name = DTYPES.get(self.dtype, (None, None))
        found = getattr(torch, name, None) if name else None
        if not isinstance(found, torch.dtype):
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r}: expected a dtype that torch "
                f"{torch.__version__} has, found {self.dtype}"
            )
        return found

    def __str__(self) -> str:
        return f"{self.name} ({self.path.name}: {self.dtype} {list(self.shape)})"


def check_is_file(path: Path) -> None:
    """Raises CheckpointError unless it is a regular file: to open a pipe waits for a writer."""
    if path.is_file():
        return
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path}: a link to {path.readlink()}, which does not exist")
    found = "no such file" if not path.exists() else "a folder" if path.is_dir() else "a device"
    raise CheckpointError(f"{path}: cannot be read: expected a file, found {found}")


def check_is_no_pointer(path: Path, start: bytes) -> None:
    """Raises CheckpointError for a file that begins as Git LFS leaves it before it is fetched."""
    if start.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{path}: expected the file itself, found a Git LFS pointer to it: get the file with "
            "`git lfs pull`"
        )


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of `path` by name.

    Raises:
        CheckpointError: the file is missing, short or inconsistent; names file and tensor.
    """
    check_is_file(path)
    try:
        with path.open("rb") as file:
            state = FileState.of(path.absolute(), os.fstat(file.fileno()))
            size = state.nbytes
            prefix = file.read(8)
            check_is_no_pointer(path, prefix + file.read(len(LFS_POINTER) - 8))
            file.seek(8)
            if len(prefix) < 8:
                raise CheckpointError(
                    f"{path}: a safetensors file has at least 8 bytes, found {size}"
                )
            length = int.from_bytes(prefix, "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: header length {length} goes beyond the file ({size} bytes) "
                    f"or the limit of {MAX_HEADER_BYTES}"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    header = _parse(path, raw)
    _check_metadata(path, header.pop("__metadata__", None))
    data_start = 8 + length
    entries = {
        name: _check_entry(state, name, fields, data_start, size - data_start)
        for name, fields in header.items()
    }
    _check_coverage(path, entries, data_start, size - data_start)
    return entries


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise CheckpointError(
            f"{path}: the header is not a JSON object: expected '{{', found {raw[:1]!r}"
        )
    try:
        text = raw.decode("utf-8")
        integer = _integer if "-0" in text else None
        header = json.loads(text, object_pairs_hook=_without_duplicates, parse_int=integer)
        if "\\u" in text:  # may be half of a surrogate pair, which no UTF-8 text can hold
            json.dumps(header, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}") from error
    assert isinstance(header, dict)
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        (key, count), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {key!r} is there {count} times")
    return found


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # JSON's -0 is no integer


def _check_metadata(path: Path, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"{path}: __metadata__ is a {type(metadata).__name__}, expected an object"
        )
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"{path}: __metadata__ {key!r} is a {type(value).__name__}, expected a string"
            )


def _check_entry(
    file: FileState, name: str, fields: Any, data_start: int, data_bytes: int
) -> TensorEntry:
    def fail(what: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: tensor {name!r}: {what}")

    if not isinstance(fields, dict):
        raise fail(f"its entry is a {type(fields).__name__}, expected an object")
    if fields.keys() != FIELDS_SET:
        raise fail(f"expected the fields {', '.join(FIELDS)}, found {', '.join(fields) or 'none'}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str):
        raise fail(f"dtype {dtype!r} is not a name")
    if not _is_list_of_sizes(shape):
        raise fail(f"shape {shape!r} is not a list of sizes")
    if not _is_list_of_sizes(offsets) or len(offsets) != 2:
        raise fail(f"data_offsets {offsets!r} is not a pair of offsets")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise fail(
            f"bytes {begin} to {end} leave the file's {data_bytes} bytes of data "
            "(a truncated file, or a damaged header)"
        )
    if dtype in DTYPES:
        product = 1
        for factor in (*shape, DTYPES[dtype][0]):
            product *= factor
            if product > MAX_SIZE:  # also where a size of 0 comes later, as in the library
                raise fail(f"{dtype} {shape} has more bits than a 64-bit number can count")
        if product % 8:
            raise fail(f"{dtype} {shape} takes {product} bits, not whole bytes")
        if product // 8 != end - begin:
            raise fail(
                f"{dtype} {shape} takes {product // 8} bytes, its offsets span {end - begin}"
            )
    return TensorEntry(name, file, dtype, tuple(shape), data_start + begin, end - begin)


def _is_list_of_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        [type(item) is int and 0 <= item <= MAX_SIZE for item in value]
    )


def _check_coverage(
    path: Path, entries: dict[str, TensorEntry], data_start: int, data_bytes: int
) -> None:
    """In the order of the file, each tensor begins where the one before it ends."""
    end, previous = data_start, "the header"
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            what = "overlap" if entry.offset < end else "leave a hole between them"
            raise CheckpointError(
                f"{path}: {previous} and tensor {entry.name!r} {what}: one ends at byte "
                f"{end - data_start} of the data, the other begins at {entry.offset - data_start}"
            )
        end, previous = entry.offset + entry.nbytes, f"tensor {entry.name!r}"
    if end != data_start + data_bytes:
        raise CheckpointError(
            f"{path}: {data_start + data_bytes - end} bytes after the last tensor belong to none"
        )
