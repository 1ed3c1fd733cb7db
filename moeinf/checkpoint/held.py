"""Bytes of experts that lie in no file, in the words of files and tensors of a checkpoint."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moeinf import _core
from moeinf.checkpoint.headers import DTYPE_NAMES, FileState, TensorEntry


@dataclass(frozen=True, slots=True)
class NoFile(FileState):
    """Bytes in no file. `path` is the name that messages say."""

    origin: _core.ByteSource = field(hash=False, compare=False)

    def check_path(self) -> None:
        """Their owner keeps them as they are."""

    @property
    def source(self) -> _core.ByteSource:
        return self.origin


_callbacks: weakref.WeakSet[_core.ByteSource] = weakref.WeakSet()


def callback(fill: Callable[[int, memoryview], int]) -> _core.ByteSource:
    """Bytes that a function writes, on threads of the core, until the interpreter ends."""
    origin = _core.ByteSource.callback(fill)
    _callbacks.add(origin)
    return origin


@atexit.register
def _close_callbacks() -> None:
    for origin in list(_callbacks):
        origin.close()


def hold(name: str, nbytes: int, origin: _core.ByteSource) -> TensorEntry:
    """The bytes of a source as a tensor of bytes."""
    file = NoFile(Path(name), nbytes, 0, id(origin), origin)
    return TensorEntry(name, file, DTYPE_NAMES[torch.uint8], (nbytes,), 0, nbytes)


def hold_tensor(name: str, tensor: torch.Tensor, owner: Any = None) -> TensorEntry:
    """A contiguous tensor in RAM, kept alive together with `owner`."""
    origin = _core.ByteSource.memory(tensor.data_ptr(), tensor.nbytes, (tensor, owner))
    whole = hold(name, tensor.nbytes, origin)
    return replace(whole, dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape))
