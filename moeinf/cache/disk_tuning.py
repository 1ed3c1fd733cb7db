"""How experts are read from a disk: by how many threads, and in chunks of how many bytes.

The fastest way depends on the disk. `moeinf doctor` measures some ways and saves for this user the
one that beat the usual by more than MARGIN, in `disk.json` below XDG_CACHE_HOME. `ExpertCache`
reads it, where neither the caller nor a profile of `moeinf tune` says anything. A result is valid
for its disk and version of moeinf.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from moeinf import _core
from moeinf.cache.measured import Measured

KEPT = Measured("disk", "experts are read as usual")
USUAL = (0, 0)  # threads, bytes of a chunk: the reader's own
WAYS = (USUAL, (4, 0), (24, 0), (0, 256 << 10), (24, 256 << 10), (0, 4 << 20), (4, 4 << 20))
EXPERT_BYTES = 4 << 20
AT_ONCE = 8  # experts, about what a decode step reads
ROUNDS = 5
MARGIN = 1.1
MOST = (64, 16 << 20)  # that a file may say: each thread has a buffer of a chunk


def measure(sample: Path) -> dict[str, Any]:
    """Reads a file of at least AT_ONCE experts in each way in turn, past the page cache.

    Returns `rows` with the median bytes per second of each way, and the `threads` and `chunk_bytes`
    of the best one, 0 where it is the usual. No rows where the file system refuses O_DIRECT.
    """
    nbytes = sample.stat().st_size
    experts = list(range(nbytes // EXPERT_BYTES))
    extents = [[(0, i * EXPERT_BYTES, EXPERT_BYTES, 0)] for i in experts]
    catalog = _core.Catalog(
        1, len(experts), EXPERT_BYTES, [(str(sample), nbytes)], np.array(extents, np.uint64)
    )
    readers = {way: _core.FileReader(catalog, threads=way[0], chunk_bytes=way[1]) for way in WAYS}
    if not readers[USUAL].file_is_direct(0):
        return {"rows": [], "threads": 0, "chunk_bytes": 0}
    pool = _core.SlotPool(EXPERT_BYTES, AT_ONCE)
    pool.resize(AT_ONCE)
    rates: dict[tuple[int, int], list[float]] = {way: [] for way in WAYS}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for way, reader in readers.items():
            order.shuffle(experts)
            rates[way].append(_rate(reader, pool, experts[: len(experts) // 4]))
    rows = [
        {
            "threads": readers[way].threads,
            "chunk_bytes": readers[way].chunk_bytes,
            "bytes_per_second": statistics.median(found),
        }
        for way, found in rates.items()
    ]
    threads, chunk = best(rates)
    return {"rows": rows, "threads": threads, "chunk_bytes": chunk}


def best(rates: dict[tuple[int, int], list[float]]) -> tuple[int, int]:
    """The fastest way at the median, if it beats the usual by MARGIN, and in all rounds but one;
    else the usual."""
    medians = {way: statistics.median(found) for way, found in rates.items()}
    fastest = max(medians, key=lambda way: medians[way])
    won = sum(one > other for one, other in zip(rates[fastest], rates[USUAL], strict=True))
    wins = medians[fastest] > MARGIN * medians[USUAL] and won >= ROUNDS - 1
    return fastest if wins else USUAL


def store(folder: Path, measured: dict[str, Any]) -> Path:
    """Keeps a measurement for the disk of that folder. Raises OSError."""
    return KEPT.put(_disk_of(folder), measured)


def settings(file: Path | None, threads: int, chunk_bytes: int) -> tuple[int, int]:
    """Threads and chunk for a file: those given, else what was measured for its disk, else 0. None:
    experts in no file."""
    if threads or chunk_bytes or file is None:
        return threads, chunk_bytes
    try:
        measured = KEPT.get(_disk_of(file))
    except OSError:  # it is gone, which is said where it is opened
        return USUAL
    if measured is None:
        return USUAL
    found = measured if isinstance(measured, dict) else {}
    number, chunk = found.get("threads"), found.get("chunk_bytes")
    if (
        type(number) is int
        and type(chunk) is int
        and 0 <= number <= MOST[0]
        and 0 <= chunk <= MOST[1]
        and chunk % 4096 == 0
    ):
        return number, chunk
    KEPT.warn(f"threads and chunk_bytes are {number!r} and {chunk!r}")
    return USUAL


def _rate(reader: _core.FileReader, pool: _core.SlotPool, experts: list[int]) -> float:
    start = time.perf_counter()
    for first in range(0, len(experts), AT_ONCE):
        step = experts[first : first + AT_ONCE]
        for ticket in [reader.submit(expert, pool, slot) for slot, expert in enumerate(step)]:
            ticket.wait()
            if ticket.error is not None:
                raise OSError(ticket.error)
    return len(experts) * EXPERT_BYTES / (time.perf_counter() - start)


def _disk_of(path: Path) -> str:
    number = path.stat().st_dev
    link = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    name = link.resolve().name if link.exists() else f"device {number}"
    return f"{name}, {shutil.disk_usage(path).total} bytes"
