"""Reads the header of a GGUF file, or of all parts of a split one, and trusts nothing in it.

A GGUF file is a magic word, a version, two counts, pairs of keys and values, one record for each
tensor, and the tensors. Each length, count, shape and offset is checked against the file's size
before anything of that size is made. What lies in the tensors is not looked at.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeinf.checkpoint.blocks import BLOCKS
from moeinf.checkpoint.formats import FORMATS, VALUES
from moeinf.checkpoint.headers import FileState, TensorEntry, check_is_file
from moeinf.checkpoint.packed import PackedEntry
from moeinf.errors import CheckpointError, UnsupportedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
MAX_SIZE = 2**63 - 1
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q",
           12: "d"}  # fmt: skip

# Number of a type: its name, and the elements and bytes of a block. Only the size is needed of
# those that are neither floats nor in BLOCKS: a tensor that nobody wants refuses nothing.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip


@dataclass(frozen=True)
class GgufFile:
    """The keys and the tensors of a model, of all parts where it is split."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: dict[str, TensorEntry]

    @property
    def architecture(self) -> str:
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise CheckpointError(f"{self.path}: general.architecture is {name!r}, expected a name")
        return name


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file. The file need not be there."""
    return path.suffix == ".gguf" and not path.is_dir()


def parts_of(name: str) -> list[str]:
    """The names of all files of the model that a file is of."""
    found = PART.fullmatch(name)
    if found is None:
        return [name]
    count = int(found["count"])
    return [f"{found['stem']}-{number + 1:05}-of-{count:05}.gguf" for number in range(count)]


def gguf_in(folder: Path) -> Path | None:
    """The GGUF model in a folder without config.json; None where there is none.

    Raises CheckpointError where there is more than one. Projectors of images are no models.
    """
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    files = [file for file in sorted(folder.glob("*.gguf")) if not file.name.startswith("mmproj")]
    models = {parts_of(file.name)[0] for file in files}
    if len(models) > 1:
        raise CheckpointError(
            f"{folder}: expected one GGUF model, found {', '.join(sorted(models))}"
        )
    return files[0] if files else None


def read_gguf(path: Path) -> GgufFile:
    """The header of `path`, and of every other part if it is a part of a split file.

    Raises:
        CheckpointError: the file is missing, short or inconsistent, or a part is.
        UnsupportedError: a version or a type of tensor that is not known.
    """
    metadata, tensors = _read_one(path)
    count = _whole(path, metadata, "split.count", 1)
    if count == 1:
        return GgufFile(path, metadata, tensors)
    named = PART.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise CheckpointError(
            f"{path}: is one of {count} parts: expected a name such as "
            f"model-00001-of-{count:05}.gguf"
        )
    metadata, tensors = {}, {}
    for number, name in enumerate(parts_of(path.name)):
        part = path.with_name(name)
        if not part.exists():
            raise CheckpointError(f"{part}: missing, though {path.name} is one of {count} parts")
        keys, entries = _read_one(part)
        found = _whole(part, keys, "split.no", -1), _whole(part, keys, "split.count", 1)
        if found != (number, count):
            raise CheckpointError(
                f"{part}: split.no and split.count are {found[0]} and {found[1]}, expected "
                f"{number} and {count}"
            )
        for twice in entries.keys() & tensors.keys():
            raise CheckpointError(f"{part}: tensor {twice!r} is also in {tensors[twice].path.name}")
        metadata = metadata or keys
        tensors |= entries
    first = path.with_name(parts_of(path.name)[0])
    expected = _whole(first, metadata, "split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(
            f"{first}: split.tensors.count is {expected}, the parts have {len(tensors)} tensors"
        )
    return GgufFile(first, metadata, tensors)


def _whole(path: Path, metadata: Mapping[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if type(value) is not int:
        raise CheckpointError(f"{path}: {key} is {value!r}, expected a whole number")
    return value


def _read_one(path: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    check_is_file(path)
    try:
        with path.open("rb") as file:
            state = FileState.of(path.absolute(), os.fstat(file.fileno()))
            return _Reader(file, state).read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Reader:
    """One pass over a header. `at` is the place in the file, in bytes."""

    def __init__(self, file: Any, state: FileState):
        self.file = file
        self.state = state
        self.at = 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.state.path}: {what}")

    def take(self, nbytes: int, what: str) -> bytes:
        left = self.state.nbytes - self.at
        if nbytes > left:
            raise self.fail(
                f"{what} takes {nbytes} bytes from byte {self.at}, the file has {left} more "
                "(a truncated file, or a damaged header)"
            )
        raw: bytes = self.file.read(nbytes)
        if len(raw) != nbytes:
            raise self.fail(f"{what}: ends after {len(raw)} of {nbytes} bytes")
        self.at += nbytes
        return raw

    def numbers(self, layout: str, what: str) -> tuple[Any, ...]:
        layout = f"<{layout}"
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))

    def number(self, layout: str, what: str) -> int:
        return int(self.numbers(layout, what)[0])

    def string(self, what: str) -> str:
        try:
            return self.take(self.number("Q", what), what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error}") from error

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in NUMBERS:
            raise self.fail(f"{what} has type {kind}, which GGUF does not have")
        return self.values(kind, 1, what)[0]

    def values(self, kind: int, count: int, what: str) -> list[Any]:
        size = struct.calcsize(f"<{NUMBERS[kind]}")
        raw = self.take(count * size, what)
        if kind == BOOL and raw.translate(None, b"\0\1"):
            raise self.fail(f"{what} is neither true nor false")
        return list(struct.unpack(f"<{count}{NUMBERS[kind]}", raw))

    def array(self, what: str) -> list[Any]:
        kind, count = self.numbers("IQ", what)
        if kind in NUMBERS:
            return self.values(kind, count, what)
        if kind != STRING:
            raise self.fail(f"{what} is an array of type {kind}, expected numbers or strings")
        if count > self.state.nbytes // 8:  # each has its length before it
            raise self.fail(f"{what} has {count} strings, more than the file has room for")
        return [self.string(what) for _ in range(count)]

    def read(self) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
        magic = self.take(4, "the magic word")
        if magic != MAGIC:
            raise self.fail(f"expected a GGUF file, which begins with {MAGIC!r}, found {magic!r}")
        version = self.number("I", "the version")
        if version not in VERSIONS:
            raise UnsupportedError(
                f"{self.state.path}: GGUF version {version}, expected "
                f"{' or '.join(map(str, VERSIONS))} with the lower bytes first"
            )
        tensors, pairs = self.numbers("QQ", "the counts")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string("a key")
            if key in metadata:
                raise self.fail(f"key {key!r} is there twice")
            kind = self.number("I", f"the type of {key!r}")
            metadata[key] = self.value(kind, repr(key))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or (
            alignment & (alignment - 1)
        ):  # fmt: skip
            raise self.fail(f"general.alignment is {alignment!r}, expected a power of two")
        records = [self.record() for _ in range(tensors)]
        start = -(-self.at // alignment) * alignment
        entries: dict[str, TensorEntry] = {}
        for name, shape, kind, offset in records:
            if name in entries:
                raise self.fail(f"tensor {name!r} is there twice")
            entries[name] = self.entry(name, shape, kind, offset, start, alignment)
        end, before = start, "the header"
        for entry in sorted(entries.values(), key=lambda one: (one.offset, one.nbytes)):
            if entry.offset < end:
                raise self.fail(f"{before} and tensor {entry.name!r} overlap at {entry.offset}")
            end, before = entry.offset + entry.nbytes, f"tensor {entry.name!r}"
        return metadata, entries

    def record(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("the name of a tensor")
        count = self.number("I", f"tensor {name!r}")
        if not 1 <= count <= MAX_DIMENSIONS:
            raise self.fail(f"tensor {name!r} has {count} dimensions, expected 1 to 4")
        sizes = self.numbers(f"{count}Q", f"tensor {name!r}")
        kind, offset = self.numbers("IQ", f"tensor {name!r}")
        return name, sizes[::-1], kind, offset

    def entry(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, alignment: int
    ) -> TensorEntry:
        """`shape` is outermost first, as everywhere here; the file has it the other way round."""
        if kind not in TYPES:
            raise UnsupportedError(
                f"{self.state.path}: tensor {name!r}: type {kind} is not known; known are "
                + ", ".join(word for word, *_ in TYPES.values())
            )
        word, elements, size = TYPES[kind]
        count = math.prod(shape)
        if not 0 < count <= MAX_SIZE:
            raise self.fail(f"tensor {name!r}: expected a shape of sizes above zero, found {shape}")
        if shape[-1] % elements:
            raise self.fail(
                f"tensor {name!r}: rows of {shape[-1]} elements are no whole blocks of {elements} "
                f"({word})"
            )
        nbytes = count // elements * size
        if offset % alignment:
            raise self.fail(f"tensor {name!r}: offset {offset} is no multiple of {alignment}")
        if start + offset + nbytes > self.state.nbytes:
            raise self.fail(
                f"tensor {name!r}: bytes {start + offset} to {start + offset + nbytes} leave the "
                f"file's {self.state.nbytes} (a truncated file, or a damaged header)"
            )
        place = self.state, word, shape, start + offset, nbytes
        if word.lower() not in BLOCKS:
            return TensorEntry(name, *place)
        stored = TensorEntry(
            name, self.state, "U8", (*shape[:-1], shape[-1] // elements * size), *place[3:]
        )
        return PackedEntry(name, *place, FORMATS[word.lower()], {VALUES: stored})
