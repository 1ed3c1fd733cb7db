"""Reads the header of a safetensors file, trusting nothing in it.

The `safetensors` library hands out tensors; the cache needs byte ranges, so that experts can be
read straight into slots. Only the header is read here, and every length, dtype, shape and offset is
checked against the others and against the file's size before anyone uses it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from moeinf.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of one file: `nbytes` bytes from `offset` (counted from the start of the file)."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name} ({self.path.name}: {str(self.dtype)[6:]} {list(self.shape)})"


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of `path` by name.

    Raises:
        CheckpointError: the file is missing, short or inconsistent; names file and tensor.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
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
    return _check_header(path, raw, data_start=8 + length, data_bytes=size - 8 - length)


def _check_header(
    path: Path, raw: bytes, *, data_start: int, data_bytes: int
) -> dict[str, TensorEntry]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: the header is a {type(header).__name__}, expected an object"
        )
    header.pop("__metadata__", None)
    entries = {}
    for name, fields in header.items():
        entries[name] = _check_entry(path, name, fields, data_start, data_bytes)
    _check_overlaps(path, entries)
    return entries


def _check_entry(
    path: Path, name: str, fields: Any, data_start: int, data_bytes: int
) -> TensorEntry:
    def fail(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r}: {what}")

    if not isinstance(fields, dict):
        raise fail(f"its entry is a {type(fields).__name__}, expected an object")
    name_of_dtype, shape, offsets = map(fields.get, ("dtype", "shape", "data_offsets"))
    if not isinstance(name_of_dtype, str) or name_of_dtype not in DTYPES:
        raise fail(f"unknown dtype {name_of_dtype!r}, expected one of {', '.join(DTYPES)}")
    dtype = DTYPES[name_of_dtype]
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
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise fail(
            f"{str(dtype)[6:]} {shape} takes {expected} bytes, its offsets span {end - begin}"
        )
    return TensorEntry(name, path, dtype, tuple(shape), data_start + begin, expected)


def _is_list_of_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_overlaps(path: Path, entries: dict[str, TensorEntry]) -> None:
    previous = None
    filled = [entry for entry in entries.values() if entry.nbytes]
    for entry in sorted(filled, key=lambda entry: entry.offset):
        if previous is not None and entry.offset < previous.offset + previous.nbytes:
            raise CheckpointError(
                f"{path}: tensors {previous.name!r} and {entry.name!r} overlap: one ends at byte "
                f"{previous.offset + previous.nbytes}, the other begins at {entry.offset}"
            )
        previous = entry
