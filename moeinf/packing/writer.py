"""Reads and writes large parts of files, past the page cache where the file system allows it.

Through the page cache a large file is written at a fifth of the disk's rate. A direct write takes
whole pages at addresses of whole pages. So a part is made at an address that is its offset modulo
a page: the pages inside go straight to the disk, and the bytes at its two ends through the cache.
A direct read takes whole pages too: it ends in a buffer, and what was asked for is copied.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from moeinf.checkpoint.folder import read_into
from moeinf.checkpoint.headers import FileState, TensorEntry
from moeinf.memory_read import HugeArea

PAGE = 4096
T = TypeVar("T")


class FileWriter:
    """One file, its room taken at once. Threads may write different parts at the same time."""

    def __init__(self, path: Path, nbytes: int):
        """Raises OSError, with the file's name, where the disk has no room for it."""
        self.path = path
        self._cached = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._direct: int | None = None
        try:
            with self._named():
                os.posix_fallocate(self._cached, 0, nbytes)
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:  # this is a file system without direct writes
                self.close()
                raise

    def write(self, offset: int, data: torch.Tensor) -> None:
        """uint8 [n] at an address that is `offset` modulo a page."""
        view = data.numpy().data
        first = min(-offset % PAGE, len(view))
        last = max(first, first + (len(view) - first) // PAGE * PAGE)
        with self._named():
            self._write(self._cached, offset, view[:first])
            self._write(self._direct, offset + first, view[first:last])
            self._write(self._cached, offset + last, view[last:])

    def write_small(self, offset: int, data: bytes) -> None:
        """Bytes at any address, through the cache."""
        with self._named():
            self._write(self._cached, offset, memoryview(data))

    def _write(self, descriptor: int | None, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = os.pwrite(
                self._cached if descriptor is None else descriptor, view[done:], offset + done
            )
            done += count
            if count % PAGE:
                descriptor = None  # the rest begins inside a page

    def sync(self) -> None:
        """Returns once the bytes are on the disk."""
        with self._named():
            os.fsync(self._cached)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the system name the file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from error

    def close(self) -> None:
        for descriptor in (self._cached, self._direct):
            if descriptor is not None:
                os.close(descriptor)
        self._direct = None


class Buffers:
    """A buffer for each thread, used again for each part that it writes."""

    def __init__(self, nbytes: int):
        self._nbytes = nbytes + PAGE
        self._local = threading.local()

    def at(self, offset: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] at an address that is `offset` modulo a page."""
        if not hasattr(self._local, "area"):
            self._local.area = HugeArea(self._nbytes).bytes
        start = offset % PAGE
        found: torch.Tensor = self._local.area[start : start + nbytes]
        return found


class DirectReader:
    """Reads parts of tensors. Its files stay open until `close`."""

    def __init__(self, nbytes: int):
        """`nbytes`: the largest part."""
        self._buffers = Buffers(nbytes + PAGE)
        self._lock = threading.Lock()
        self._files: dict[FileState, int | None] = {}  # None: no direct reads there

    def read(self, entry: TensorEntry, offset: int, out: torch.Tensor) -> None:
        """Fills uint8 [n] with a part of a tensor; `offset` counts from the file's start.

        Raises ReadError as `read_into`.
        """
        descriptor = self._open(entry.file)
        nbytes, before = out.numel(), offset % PAGE
        if descriptor is None or nbytes < PAGE:
            read_into(entry, offset, out)
            return
        room = -(-(before + nbytes) // PAGE) * PAGE
        buffer = self._buffers.at(0, room)
        entry.file.check(os.fstat(descriptor))
        try:
            count = os.preadv(descriptor, [buffer.numpy().data], offset - before)
        except OSError:
            count = 0
        if count < before + nbytes:  # cut short, or refused: the other way says why
            read_into(entry, offset, out)
            return
        out.copy_(buffer[before : before + nbytes])

    def _open(self, file: FileState) -> int | None:
        with self._lock:
            if file not in self._files:
                try:
                    found: int | None = os.open(file.path, os.O_RDONLY | os.O_DIRECT)
                except OSError:
                    found = None
                self._files[file] = found
            return self._files[file]

    def close(self) -> None:
        for descriptor in self._files.values():
            if descriptor is not None:
                os.close(descriptor)
        self._files = {}


class Disk:
    """What threads read into and write from, for parts of at most `nbytes`."""

    def __init__(self, nbytes: int):
        self.buffers = Buffers(nbytes)
        self.reader = DirectReader(nbytes)

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()


def in_threads(calls: Sequence[Callable[[], T]], threads: int) -> Iterator[T]:
    """The results of the calls as they end, on `threads` threads.

    After an error, or where the caller stops, the calls that have not begun are left out.
    """
    with ThreadPoolExecutor(threads) as pool:
        try:
            for future in as_completed([pool.submit(call) for call in calls]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
