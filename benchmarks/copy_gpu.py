"""What copying experts to a GPU costs: bandwidth by size, gather against DMA, host time per step.

    python -m benchmarks.copy_gpu [--json FILE]

Every row copies experts of one size from the pinned RAM tier into slots, all of them misses, and
states the bandwidth over the pinned peak: one large copy by torch, measured in the same run. Under
a driver made for tests no such peak exists, and the best row stands in for it. Host time per step
is that of a decode step with every expert resident. `--tiny` runs the same in seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import moeinf
from benchmarks.common import print_table, write_json
from benchmarks.random_checkpoint import Geometry, write_random_checkpoint
from moeinf.devices import open_device
from moeinf.errors import UnsupportedError

# hidden, intermediate: experts of 0.2, 0.8, 3, 9 (Qwen3-30B-A3B's size), 17 and 50 MB in bf16.
SIZES = ((256, 128), (512, 256), (1024, 512), (2048, 768), (2048, 1408), (4096, 2048))
TINY = ((64, 32), (128, 64))
PEAK_BYTES = 256 * 2**20


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
    width = max(1, store.num_experts // 2)
    cache = moeinf.ExpertCache(
        store,
        device=device,
        slots=width,
        policy="lru",
        gather_below=store.slot_bytes + 1 if gather else 0,
    )
    halves = [list(range(width)), list(range(width, 2 * width))]
    for half in halves:  # from the files into RAM
        step(cache, half)
    wait(cache)
    start = time.perf_counter()
    for _ in range(rounds):
        for half in halves:
            step(cache, half)
    wait(cache)
    moved = 2 * rounds * width * store.layout.nbytes
    return moved / (time.perf_counter() - start)


def step(cache: moeinf.ExpertCache, experts: list[int]) -> None:
    """One step of layer 0 over `experts`, one token each, as short as the operator allows."""
    store = cache.store
    hidden = store.layout["down"].shape[0]
    tokens = len(experts)
    moeinf.fused_experts(
        torch.zeros(tokens, hidden, dtype=torch.bfloat16, device=cache.device),
        torch.tensor(experts, device=cache.device)[:, None],
        torch.ones(tokens, 1, device=cache.device),
        cache,
        0,
    )


def wait(cache: moeinf.ExpertCache) -> None:
    if cache.device.type == "cuda":
        torch.cuda.synchronize(cache.device)


def host_microseconds(store: moeinf.ExpertStore, device: str, steps: int) -> float:
    """Median host time of a decode step, all resident: its wait for the ids, until launched."""
    cache = moeinf.ExpertCache(store, device=device, memory="100%")
    hidden = torch.zeros(
        1, store.layout["down"].shape[0], dtype=torch.bfloat16, device=cache.device
    )
    ids = torch.arange(store.top_k, device=cache.device)[None]
    weights = torch.ones(1, store.top_k, device=cache.device)
    times = []
    for _ in range(steps + 3):
        wait(cache)
        start = time.perf_counter()
        moeinf.fused_experts(hidden, ids, weights, cache, 0)
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[3:])


def measure(size: tuple[int, int], options: argparse.Namespace) -> dict[str, Any]:
    hidden, intermediate = size
    geometry = Geometry(
        hidden=hidden, intermediate=intermediate, experts=16, top_k=4, layers=1,
        heads=2, kv_heads=1, head_dim=32, vocabulary=64,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
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
    try:
        rows = [measure(size, options) for size in (TINY if options.tiny else SIZES)]
    except UnsupportedError as error:
        print(f"skipped: {error}")
        if options.json:
            write_json(options.json, "copy_gpu", skipped=str(error))
        return 0
    print_table(rows, COLUMNS)
    if options.json:
        write_json(options.json, "copy_gpu", tiny=options.tiny, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
