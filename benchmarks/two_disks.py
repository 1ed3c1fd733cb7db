"""A second copy on another disk: experts per second from both, over those from the first alone.

    python -m benchmarks.two_disks --json benchmarks/results/two_disks.json

The disks are throttled sources of this program: each serves its reads one after another at a set
speed, as a device does that is busy without a pause. No device is needed, and none is measured:
what is measured is how the file reader divides its reads. Each ratio is the median of rounds, in
which both ways are measured in turn. The limit is the time of the first alone over that of two
disks that divide each read by their speeds, and that know a change of speed at once.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.common import print_table, write_json
from moeinf import _core

EXPERT_BYTES = 1 << 20
EXPERTS = 64
PASSES = 4  # over all of them, after the speed has changed
# Megabytes a second: of the first disk, of the second, and of the second from the middle on.
PAIRS = ((200, 200, 200), (200, 100, 100), (200, 50, 50), (200, 1000, 1000), (200, 200, 20))


class Disk:
    """Zeros at a speed in MB/s; reads wait for one another."""

    def __init__(self, speed: float):
        self.speed = speed
        self.free_at = 0.0
        self.queue = threading.Lock()

    def read(self, offset: int, out: memoryview) -> int:
        with self.queue:
            self.free_at = max(self.free_at, time.perf_counter()) + len(out) / self.speed / 1e6
            until = self.free_at
        time.sleep(max(0.0, until - time.perf_counter()))
        return len(out)


def seconds(disks: list[Disk], later: float) -> float:
    """For 1 + PASSES passes over all experts; the last disk has the speed `later` in PASSES."""
    sources = [_core.ByteSource.callback(disk.read) for disk in disks]
    rows = [[(0, i * EXPERT_BYTES, EXPERT_BYTES, 0)] for i in range(EXPERTS)]
    catalog = _core.Catalog(
        1,
        EXPERTS,
        EXPERT_BYTES,
        [("first", EXPERTS * EXPERT_BYTES)],
        np.array(rows, np.uint64),
        sources={0: sources[0]},
        copies=[(0, 1, "second", source) for source in sources[1:]],
    )
    reader = _core.FileReader(catalog, threads=8)
    pool = _core.SlotPool(EXPERT_BYTES, EXPERTS)
    pool.resize(EXPERTS)

    def read(experts: range) -> None:
        tickets = [reader.submit(i, pool, i) for i in experts]
        for ticket in tickets:
            ticket.wait()

    read(range(EXPERTS // 2))
    start = time.perf_counter()
    read(range(EXPERTS))
    disks[-1].speed = later
    for _ in range(PASSES):
        read(range(EXPERTS))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for first, second, later in PAIRS:
        ratios = [
            seconds([Disk(first)], first) / seconds([Disk(first), Disk(second)], later)
            for _ in range(args.rounds)
        ]
        limit = (1 + PASSES) / (first / (first + second) + PASSES * first / (first + later))
        rows.append(
            {
                "first_mb_s": first,
                "second_mb_s": second,
                "second_later_mb_s": later,
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "limit": limit,
            }
        )
    print_table(
        rows,
        {
            "first_mb_s": ("first MB/s", "d"),
            "second_mb_s": ("second MB/s", "d"),
            "second_later_mb_s": ("later MB/s", "d"),
            "ratio": ("both over one", ".2f"),
            "least": ("least", ".2f"),
            "most": ("most", ".2f"),
            "limit": ("limit", ".2f"),
        },
    )
    if args.json:
        write_json(
            args.json, "two_disks", expert_bytes=EXPERT_BYTES, rounds=args.rounds, pairs=rows
        )


if __name__ == "__main__":
    main()
