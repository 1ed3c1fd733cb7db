"""Copies of a checkpoint's files on other disks, which are read beside the files themselves.

A copy may be of some of the files. A file of a copy has the name, the size and the header of the
file itself, to the byte, and the same bytes in the middle of SAMPLES of its runs of experts' bytes.
Other bytes are not compared: that would read both disks in full.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeinf.checkpoint.headers import FileState, TensorEntry
from moeinf.errors import CheckpointError

SAMPLES = 16
SAMPLE_BYTES = 64 << 10
STEP = 1 << 20


@dataclass(frozen=True)
class Copy:
    """A file that holds the same bytes as the one with the number `of`."""

    of: int
    place: int
    file: FileState


def paths_of(also: str | bytes | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """One path or several, as a list."""
    if isinstance(also, (str, bytes, os.PathLike)):
        return [Path(os.fsdecode(also))]
    return [Path(one) for one in also]


def find_copies(
    also: Sequence[Path],
    files: Sequence[FileState],
    runs: npt.NDArray[np.uint64],
    tensors: Sequence[TensorEntry],
) -> list[Copy]:
    """The copies of the files of experts in folders, or of the GGUF files that `also` names.

    Args:
        runs: [n, 3], where experts' bytes lie: the number of the file, offset, bytes.
        tensors: of the checkpoint: a header ends where the first of them begins.

    Raises:
        CheckpointError: a copy is of another checkpoint, or of another state of it; the message
            names file, expected and found.
    """
    copies = []
    for place, path in enumerate(also, 1):
        folder = path if path.is_dir() else path.parent
        found = [
            Copy(i, place, _checked(file, folder / file.path.name, runs[runs[:, 0] == i], tensors))
            for i, file in enumerate(files)
            if file.source is None and (folder / file.path.name).exists()
        ]
        names = sorted(file.path.name for file in files if file.source is None)
        if not found or not (path.is_dir() or path.name in names):
            more = f" or one of {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{path}: expected a copy of files with experts, {names[0] if names else 'none'}"
                f"{more}, found {'no such path' if not path.exists() else 'none of them'}"
            )
        copies += found
    return copies


def _checked(
    file: FileState, path: Path, runs: npt.NDArray[np.uint64], tensors: Sequence[TensorEntry]
) -> FileState:
    try:
        with file.path.open("rb", buffering=0) as own, path.open("rb", buffering=0) as other:
            state = FileState.of(path.absolute(), os.fstat(other.fileno()))
            file.check(os.fstat(own.fileno()))
            if os.path.sameopenfile(own.fileno(), other.fileno()):
                raise CheckpointError(
                    f"{path}: expected a copy on another disk, found {file.path} itself"
                )
            if state.nbytes != file.nbytes:
                raise CheckpointError(
                    f"{path}: expected {file.nbytes} bytes, as {file.path} has, found "
                    f"{state.nbytes}"
                )

            def compare(begin: int, end: int, part: str) -> None:
                for offset in range(begin, end, STEP):
                    nbytes = min(STEP, end - offset)
                    expected, found = (
                        np.frombuffer(os.pread(one.fileno(), nbytes, offset), np.uint8)
                        for one in (own, other)
                    )
                    if not np.array_equal(expected, found):
                        at = np.flatnonzero(expected != found)[0]
                        raise CheckpointError(
                            f"{path}: expected the {part} of {file.path}, byte "
                            f"{offset + at} is {expected[at]:#04x} there, found {found[at]:#04x}"
                        )

            compare(0, _header_bytes(own.fileno(), file, tensors), "header")
            ordered = runs[np.argsort(runs[:, 1], kind="stable")]
            for i in np.unique(np.linspace(0, len(ordered) - 1, SAMPLES).astype(int)):
                _, offset, nbytes = map(int, ordered[i])
                begin = offset + max(0, nbytes - SAMPLE_BYTES) // 2
                compare(begin, min(begin + SAMPLE_BYTES, offset + nbytes), "experts")
            for one in (own, other):
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(one.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: cannot be compared with {file.path}: "
            f"{error.strerror or error}"
        ) from error
    return state


def _header_bytes(descriptor: int, file: FileState, tensors: Sequence[TensorEntry]) -> int:
    start = os.pread(descriptor, 8, 0)
    if not start.startswith(b"GGUF"):
        return 8 + int.from_bytes(start, "little")
    return min(one.offset for one in tensors if one.file == file)
