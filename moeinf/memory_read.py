"""The read rate of this machine's memory: the limit of the CPU kernels at one token."""

from __future__ import annotations

import mmap
import time

import torch

from moeinf import _core

MIB = 1 << 20
HUGE_PAGE = 2 * MIB


class HugeArea:
    """Anonymous memory in huge pages where the system allows it, aligned to 2 MiB.

    `bytes` is a uint8 tensor [nbytes] over it; views of it keep the memory alive.
    """

    def __init__(self, nbytes: int) -> None:
        area = mmap.mmap(-1, nbytes + HUGE_PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            area.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(area, dtype=torch.uint8)
        start = -whole.data_ptr() % HUGE_PAGE
        self.bytes = whole[start : start + nbytes]


class ReadLimit:
    """The fastest rate at which the engine's threads read memory, over the patterns of the probe.

    The probe reads `area` (uint8) in turn. It is larger than any processor cache.
    """

    PATTERNS = tuple((task, streams) for task in (MIB, 8 * MIB) for streams in (1, 4, 8))

    def __init__(self, engine: _core.CpuEngine, area: torch.Tensor, nbytes: int = 64 * MIB) -> None:
        self.engine, self.area, self.nbytes = engine, area, nbytes
        self.rates: list[float] = []  # the best of each round, bytes per second
        self.offset = 0

    def measure(self) -> float:
        """One round over all patterns: its best rate in bytes per second."""
        best = 0.0
        for task, streams in self.PATTERNS:
            if self.offset + self.nbytes > self.area.numel():
                self.offset = 0
            address = self.area.data_ptr() + self.offset
            self.offset += self.nbytes
            start = time.perf_counter()
            self.engine.read_all(address, self.nbytes, task_bytes=task, streams=streams)
            best = max(best, self.nbytes / (time.perf_counter() - start))
        self.rates.append(best)
        return best

    @property
    def best(self) -> float:
        return max(self.rates)


def memory_read_bandwidth(rounds: int = 5) -> float:
    """Bytes per second, the best of a few rounds over 512 MiB with every core."""
    limit = ReadLimit(_core.CpuEngine(), HugeArea(512 * MIB).bytes.fill_(1))
    for _ in range(rounds):
        limit.measure()
    return limit.best
