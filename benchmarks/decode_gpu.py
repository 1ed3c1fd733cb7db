"""Time per token of a model's experts on a GPU, at 5 to 100% residency, against its own limits.

    python -m benchmarks.decode_gpu [--trace FILE] [--models ...] [--json FILE]

Replays decode routing over random weights with the geometry of published models. It computes the
expert FFN of every layer, one token at a time, and no other part of the model. Each time stands
beside three limits: the roofline (the larger of the all-resident time and the time that the link
needs for the copied bytes, at the pinned bandwidth of this run), the shortest time in which every
expert could be fetched for every token, and the all-resident time. The row of 0% fetches on demand
into one slot. One cache serves all rows of a model, from the most slots to the fewest, so every
expert is in pinned RAM before the first row is timed. `--tiny` runs in seconds on any driver, also
on the fake one; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import moeinf
from benchmarks.common import print_table, write_json
from benchmarks.copy_gpu import pinned_peak
from benchmarks.random_checkpoint import Geometry, folder_for, write_random_checkpoint
from benchmarks.routing_replay import decode_routing
from moeinf.cache.budget import slots_for
from moeinf.errors import CapacityError, UnsupportedError

SHARES = (0, 5, 10, 25, 50, 75, 100)
# Layers are cut so that the experts of each take about 5 GB of disk and RAM.
MODELS = {
    "Qwen3-30B-A3B": Geometry(layers=4),
    "DeepSeek-V2-Lite": Geometry(
        hidden=2048, intermediate=1408, experts=64, top_k=6, layers=5, vocabulary=512
    ),
    "Mixtral-8x7B": Geometry(
        hidden=4096, intermediate=14336, experts=8, top_k=2, layers=2, vocabulary=512
    ),
}
TINY = {
    "tiny": Geometry(
        hidden=64, intermediate=32, experts=16, top_k=2, layers=2,
        heads=2, kv_heads=1, head_dim=32, vocabulary=64,
    )
}  # fmt: skip


class Replay:
    """Tokens of random hidden states with recorded routing, on the device of a cache."""

    def __init__(self, geometry: Geometry, routing: Any, device: torch.device) -> None:
        make = torch.Generator().manual_seed(0)
        self.ids = torch.from_numpy(routing).to(device)[:, :, None]  # [tokens, layers, 1, k]
        self.hidden = torch.randn(1, geometry.hidden, generator=make).to(torch.bfloat16).to(device)
        self.weights = torch.full((1, geometry.top_k), 1 / geometry.top_k, device=device)
        self.layers = geometry.layers

    def run(self, cache: moeinf.ExpertCache, first: int, end: int) -> float:
        """Seconds per token of tokens [first, end)."""
        wait(cache.device)
        start = time.perf_counter()
        for token in range(first, end):
            cache.begin_pass(moeinf.ForwardPass(new_sequence=token == 0))
            for layer in range(self.layers):
                moeinf.fused_experts(
                    self.hidden, self.ids[token, layer], self.weights, cache, layer
                )
        wait(cache.device)
        return (time.perf_counter() - start) / (end - first)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    name: str, geometry: Geometry, store: moeinf.ExpertStore, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per residency, all-resident first, for that is one of the limits."""
    routing = decode_routing(
        options.trace,
        tokens=options.tokens,
        layers=geometry.layers,
        experts=geometry.experts,
        top_k=geometry.top_k,
    )
    rows: list[dict[str, Any]] = []
    cache = resident = None
    peak = pinned_peak(store, options.device)
    for share in sorted(options.shares, reverse=True):
        slots = slots_of(share, store)
        try:
            if cache is None:
                cache = moeinf.ExpertCache(store, device=options.device, slots=slots)
                replay = Replay(geometry, routing, cache.device)
                replay.run(cache, 0, options.tokens)  # brings what it needs into RAM
            cache.resize(slots)
        except CapacityError as error:
            rows.append({"model": name, "share": share, "failed": str(error).splitlines()[0]})
            continue
        half = options.tokens // 2
        replay.run(cache, 0, half)  # compiles the kernels, fills slots
        cache.reset_stats()
        seconds = replay.run(cache, half, options.tokens)
        stats = cache.stats()
        if share == 100:
            resident = seconds
        measured = options.tokens - half
        copied = stats["misses"] * store.layout.nbytes / measured / peak
        limit = max(copied, resident or 0.0)
        on_demand = geometry.layers * geometry.top_k * store.layout.nbytes / peak
        rows.append(
            {
                "model": name,
                "share": share,
                "hit_rate": stats["hit_rate"],
                "ms_per_token": seconds * 1e3,
                "roofline_ms": limit * 1e3,
                "over_roofline": None if share == 100 else seconds / limit,
                "on_demand_ms": max(on_demand, resident or 0.0) * 1e3,
                "resident_ms": None if resident is None else resident * 1e3,
                "pinned_gb_per_s": peak / 1e9,
                "kernels": stats["host"]["kernels"],
                "copy_path": stats["host"]["copy_path"],
            }
        )
    return rows


def slots_of(share: int, store: moeinf.ExpertStore) -> int:
    """One slot for 0%."""
    total = store.num_layers * store.num_experts
    if share == 0:
        return 1
    return slots_for(
        memory=f"{share}%", slots=None, slot_bytes=store.slot_bytes, total_experts=total
    )


COLUMNS = {
    "model": ("model", ""),
    "share": ("resident %", "d"),
    "hit_rate": ("hit rate", ".3f"),
    "ms_per_token": ("ms/token", ".3f"),
    "roofline_ms": ("roofline", ".3f"),
    "over_roofline": ("over it", ".2f"),
    "on_demand_ms": ("on demand, at best", ".3f"),
    "resident_ms": ("all resident", ".3f"),
    "pinned_gb_per_s": ("pinned GB/s", ".1f"),
    "kernels": ("kernels", ""),
    "failed": ("", ""),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where the results go")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--trace", type=Path, help="a trace; the built-in model's without it")
    parser.add_argument("--models", nargs="*", help="names of geometries; all by default")
    parser.add_argument("--shares", nargs="*", type=int, default=SHARES, help="% of all experts")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where the random checkpoints are kept")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; numbers mean nothing")
    options = parser.parse_args(arguments)
    known = TINY if options.tiny else MODELS
    if unknown := set(options.models or known) - set(known):
        parser.error(f"unknown models {sorted(unknown)}; known: {list(known)}")
    if options.tokens < 2:
        parser.error("--tokens: expected at least 2")
    rows: list[dict[str, Any]] = []
    try:
        for name in options.models or known:
            place = options.folder or folder_for(known[name])
            with tempfile.TemporaryDirectory(dir=place) as folder:
                write_random_checkpoint(Path(folder), known[name])
                store = moeinf.ExpertStore.open(folder)
                found = measure(name, known[name], store, options)
            print_table(found, COLUMNS)  # each at once, for sessions end when their time is up
            rows += found
            if options.json:
                write_json(options.json, "decode_gpu", tiny=options.tiny, rows=rows)
    except UnsupportedError as error:
        print(f"skipped: {error}")
        if options.json:
            write_json(options.json, "decode_gpu", skipped=str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
