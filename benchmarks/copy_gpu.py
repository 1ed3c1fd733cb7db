"""Copying experts to a GPU: bandwidth by size, gather against DMA, host time per step.

    python -m benchmarks.copy_gpu [--json FILE]

Every row copies experts of one size from the pinned RAM tier into slots; all of them are misses.
The limit is the bandwidth of one large pinned copy by torch in the same run. A fake driver has no
such copy, so its limit is the best row. A step asks for many experts, because the link is idle
between two steps: the host learns the next experts only after the last step was computed. Host time
per step is that of a decode step with every expert resident. `--tiny` runs the same in seconds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import moeinf
from benchmarks.common import print_table, write_json
from benchmarks.random_checkpoint import Geometry, folder_for, write_random_checkpoint
from moeinf.cache.devices import open_device
from moeinf.errors import UnsupportedError

# hidden, intermediate: experts of 0.2, 0.8, 3, 9 (Qwen3-30B-A3B's size), 17 and 50 MB in bf16.
SIZES = ((256, 128), (512, 256), (1024, 512), (2048, 768), (2048, 1408), (4096, 2048))
TINY = ((64, 32), (128, 64))
PEAK_BYTES = 256 * 2**20
STEP_BYTES = 256 * 2**20  # that a step of misses copies, if 32 experts are as many
TOP_K = 8


@lru_cache(maxsize=4)
def torch_peak(index: int) -> float:
    """Bytes per second of one large pinned copy to that GPU."""
    host = torch.empty(PEAK_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty(PEAK_BYTES, dtype=torch.uint8, device=f"cuda:{index}")
    times = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return PEAK_BYTES / min(times)


def pinned_peak(store: moeinf.ExpertStore, device: str) -> float:
    """Bytes per second; where torch cannot copy, what the cache itself reaches."""
    opened = open_device(device)
    if opened is None:
        raise UnsupportedError("this benchmark measures copies to a GPU: give --device cuda")
    if not opened.is_fake:
        return torch_peak(opened.index)
    return copied(store, device, gather=False, rounds=2)


def copied(store: moeinf.ExpertStore, device: str, *, gather: bool, rounds: int) -> float:
    """Bytes per second of misses that find their experts in RAM: two halves take turns."""
    width = store.num_experts // 2
    cache = moeinf.ExpertCache(
        store,
        device=device,
        slots=width,
        policy="lru",
        gather_below=store.slot_bytes + 1 if gather else 0,
    )
    halves = [Step(cache, range(width)), Step(cache, range(width, 2 * width))]
    for half in halves * 2:  # from the files into RAM; the second time as it is measured
        half.run()
    wait(cache)
    start = time.perf_counter()
    for _ in range(rounds):
        for half in halves:
            half.run()
    wait(cache)
    moved = 2 * rounds * width * store.layout.nbytes
    return moved / (time.perf_counter() - start)


class Step:
    """A step of layer 0 over `experts`, a multiple of TOP_K: everything it needs but the experts
    lies on the device before it is run."""

    def __init__(self, cache: moeinf.ExpertCache, experts: Sequence[int]) -> None:
        self.cache = cache
        self.ids = torch.tensor(experts, device=cache.device).view(-1, TOP_K)
        tokens, hidden = len(self.ids), cache.store.layout["down"].shape[0]
        self.hidden = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device=cache.device)
        self.weights = torch.ones(tokens, TOP_K, device=cache.device)

    def run(self) -> None:
        moeinf.fused_experts(self.hidden, self.ids, self.weights, self.cache, 0)


def wait(cache: moeinf.ExpertCache) -> None:
    if cache.device.type == "cuda":
        torch.cuda.synchronize(cache.device)


def host_microseconds(store: moeinf.ExpertStore, device: str, steps: int) -> float:
    """Median host time of a decode step, all resident: its wait for the ids, until launched."""
    cache = moeinf.ExpertCache(store, device=device, memory="100%")
    step = Step(cache, range(TOP_K))
    times = []
    for _ in range(steps + 3):
        wait(cache)
        start = time.perf_counter()
        step.run()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[3:])


def experts_of(size: tuple[int, int]) -> int:
    """Two steps' worth: 8, 16 or 32 experts each, for STEP_BYTES."""
    wanted = STEP_BYTES / (6 * math.prod(size))
    return 2 * next((count for count in (8, 16) if count >= wanted), 32)


def measure(size: tuple[int, int], options: argparse.Namespace) -> dict[str, Any]:
    hidden, intermediate = size
    geometry = Geometry(
        hidden=hidden, intermediate=intermediate, experts=experts_of(size), top_k=TOP_K, layers=1,
        heads=2, kv_heads=1, head_dim=32, vocabulary=64,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=options.folder or folder_for(geometry)) as folder:
        write_random_checkpoint(Path(folder), geometry)
        store = moeinf.ExpertStore.open(folder)
        opened = open_device(options.device)
        peak = pinned_peak(store, options.device)
        row: dict[str, Any] = {
            "megabytes": store.layout.nbytes / 1e6,
            "dma": copied(store, options.device, gather=False, rounds=options.rounds) / 1e9,
            "gather": None,
            "peak": peak / 1e9,
            "host_us": host_microseconds(store, options.device, options.steps),
        }
        if opened is not None and opened.can_gather:
            gathered = copied(store, options.device, gather=True, rounds=options.rounds)
            row["gather"] = gathered / 1e9
        row["of_peak"] = max(row["dma"], row["gather"] or 0.0) / row["peak"]
    return row


COLUMNS = {
    "megabytes": ("MB per expert", ".2f"),
    "dma": ("DMA GB/s", ".2f"),
    "gather": ("gather GB/s", ".2f"),
    "peak": ("pinned peak GB/s", ".2f"),
    "of_peak": ("of the peak", ".2f"),
    "host_us": ("host us per step", ".1f"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where the results go")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200, help="decode steps timed on the host")
    parser.add_argument("--folder", type=Path, help="where the random checkpoints are kept")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; numbers mean nothing")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    try:
        for size in TINY if options.tiny else SIZES:
            rows.append(measure(size, options))
            print_table(rows[-1:], COLUMNS)  # each at once, for sessions end when their time is up
            if options.json:
                write_json(options.json, "copy_gpu", tiny=options.tiny, rows=rows)
    except UnsupportedError as error:
        print(f"skipped: {error}")
        if options.json:
            write_json(options.json, "copy_gpu", skipped=str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
