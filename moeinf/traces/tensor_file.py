"""Files of NumPy tensors and metadata: safetensors, whose errors name the file."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moeinf.errors import TraceError
from moeinf.output_files import replacing

Tensors = dict[str, npt.NDArray[Any]]


def write(path: str | Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Replaces the file at `path` whole or not at all. Raises OSError where it cannot."""
    with replacing(path) as part:
        try:
            save_file(tensors, part, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from None


def read(path: Path, file_format: str, required: set[str], optional: set[str]) -> Any:
    """Metadata and tensors of a file whose metadata says that it has the format.

    Raises:
        TraceError: it is none, or has other tensors.
        OSError: it is not there, or may not be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        found = "a folder" if path.is_dir() else "a device or pipe"
        raise TraceError(f"{path}: expected a file, found {found}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != file_format:
                raise TraceError(
                    f"{path}: metadata 'format': expected {file_format!r}, "
                    f"found {metadata.get('format')!r}"
                )
            names = set(file.keys())
            if unknown := sorted(names - required - optional):
                known = ", ".join(sorted(required | optional))
                raise TraceError(f"{path}: expected the tensors {known}, found also {unknown}")
            if missing := sorted(required - names):
                raise TraceError(f"{path}: tensor '{missing[0]}': expected, but not found")
            return metadata, {name: file.get_tensor(name) for name in names}
    except TraceError:
        raise
    except (SafetensorError, TypeError, AttributeError, ValueError) as error:
        # Also a dtype or a shape that NumPy cannot have.
        raise TraceError(f"{path}: not a readable safetensors file: {error}") from None
