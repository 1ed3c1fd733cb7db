"""How busy is the link to a device? On the fake driver of tests/fake_cuda: no GPU is measured.

    python -m benchmarks.link_busy [--trace FILE] [--json FILE]

One stream replays decode routing, step by step, over a cache that holds a quarter of the experts.
RAM holds all of them. With exclusive tiers RAM holds the other three quarters, and evicted experts
go back over the link. The fake link has a set latency per copy and a set bandwidth, the same in
both directions and low enough that this machine moves the bytes in time. It has its own clock: a
thread that wakes up late costs it nothing while work is queued.

| column | meaning |
|---|---|
| busy | share of the run in which the link to the device was occupied; the target is 0.95 |
| payload | bytes moved over the bytes that the bandwidth could have moved |
| unasked | idle, with no copy enqueued: the ids were on their way, or the host was deciding |
| held | idle, while a copy waited for the device's own order and threads |
| files | experts per step read from a disk; the disk's time says nothing about the link |

The target holds where nothing is computed. In rows with `compute` the stream works for that time in
every step, and only prefetching can fill the gap; "perfect" knows the experts of the next step. The
run is cut in rounds. A row is the best round, because other work can only make a round slower; the
medians of `busy` and of the step's time stand beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moeinf
from benchmarks.common import ROOT, print_table, write_json
from benchmarks.random_checkpoint import Geometry, write_random_checkpoint
from benchmarks.routing_replay import decode_routing
from moeinf import _core

TARGET = 0.95
SHARE, REST = "25%", "75%"
LATENCY_NS = 5_000
ROUNDS = 8
# Of 9.4 MB, Qwen3-30B-A3B's, and of 1 MB.
SIZES = {
    "9.4 MB": Geometry(experts=32, top_k=8, layers=2, vocabulary=64),
    "1.0 MB": Geometry(
        hidden=512, intermediate=341, experts=64, top_k=8, layers=4,
        heads=4, kv_heads=2, head_dim=32, vocabulary=64,
    ),
}  # fmt: skip
TINY = {
    "tiny": Geometry(
        hidden=64, intermediate=32, experts=16, top_k=2, layers=2,
        heads=2, kv_heads=1, head_dim=32, vocabulary=64,
    )
}  # fmt: skip
# exclusive tiers, prefetch, and what the reader's stream computes in a step as a share of copying
# one expert
CASES = (
    (False, "off", 0.0),
    (True, "off", 0.0),
    (False, "transition", 0.0),
    (False, "perfect", 0.0),
    (False, "off", 0.5),
    (True, "off", 0.5),
    (False, "transition", 0.5),
    (False, "perfect", 0.5),
)


class Copy(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("source", "target", "nbytes")),
        *((name, ctypes.c_int32) for name in ("direction", "priority")),
        *((name, ctypes.c_uint64) for name in ("enqueued_ns", "start_ns", "end_ns")),
    )


class FakeDriver:
    """What steers the fake driver, and a stream of it on which "kernels" can be made to run."""

    TO_DEVICE, TO_HOST = 0, 1
    MOST_COPIES = 65536

    def __init__(self) -> None:
        self.library = ctypes.CDLL(os.environ["MOEINF_CUDA_DRIVER"])
        self.library.fake_cuda_busy_ns.restype = ctypes.c_uint64
        self.library.fake_cuda_bytes.restype = ctypes.c_uint64
        self.library.fake_cuda_copies.restype = ctypes.c_uint64
        self.sleep = ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p)
        self.stream = ctypes.c_void_p()
        assert self.library.cuInit(0) == 0
        context = ctypes.c_void_p()
        assert self.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
        assert self.library.cuCtxPushCurrent_v2(context) == 0
        assert self.library.cuStreamCreateWithPriority(ctypes.byref(self.stream), 1, 0) == 0

    def compute(self, microseconds: int) -> None:
        """The stream is busy for that long, once it gets there."""
        failed = self.library.cuLaunchHostFunc(
            self.stream, self.sleep, ctypes.c_void_p(microseconds)
        )
        assert failed == 0

    def reset(self) -> None:
        self.library.fake_cuda_reset(ctypes.c_uint64(1))
        self.library.fake_cuda_set_memory(ctypes.c_uint64(1 << 40))

    def set_link(self, bytes_per_second: float) -> None:
        for direction in (self.TO_DEVICE, self.TO_HOST):
            self.library.fake_cuda_set_link(
                direction, ctypes.c_double(bytes_per_second), ctypes.c_uint64(LATENCY_NS)
            )

    def busy(self, direction: int) -> float:
        """Seconds since the last reset."""
        return self.library.fake_cuda_busy_ns(direction) / 1e9

    def copies(self) -> list[Copy]:
        copies = (Copy * self.MOST_COPIES)()
        count = self.library.fake_cuda_copies(copies, ctypes.c_uint64(self.MOST_COPIES))
        return sorted(
            (copy for copy in copies[:count] if copy.direction == self.TO_DEVICE),
            key=lambda copy: copy.start_ns,
        )


def gaps(copies: list[Copy]) -> dict[str, float]:
    """Seconds in which the link was idle between copies: nothing enqueued, or one that waited."""
    unasked = held = 0
    for before, after in itertools.pairwise(copies):
        asked = min(max(after.enqueued_ns, before.end_ns), after.start_ns)
        unasked += asked - before.end_ns
        held += after.start_ns - asked
    return {"unasked": unasked / 1e9, "held": held / 1e9}


class Replay:
    """Decode steps of recorded routing, on one stream of a cache."""

    def __init__(
        self, cache: moeinf.ExpertCache, routing: Any, driver: FakeDriver, perfect: bool
    ) -> None:
        self.cache = cache
        self.perfect = perfect
        self.ids = torch.from_numpy(routing)  # int64 [tokens, layers, k]
        self.map = torch.empty(cache.store.num_experts + 1, dtype=torch.int32)
        self.driver = driver
        self.stream = _core.StepStream(cache.core, driver.stream.value)

    def run(self, first: int, end: int, compute_us: int) -> None:
        stream = self.stream
        for token in range(first, end):
            for layer, ids in enumerate(self.ids[token]):
                stream.copy_ids(layer, ids.data_ptr(), True, 1, len(ids), self.map.data_ptr())
                wave = stream.begin()
                if self.perfect and self.cache.wants_predictions:
                    self._predict(token, layer + 1)
                while wave is not None:
                    if compute_us:
                        self.driver.compute(compute_us)
                    wave = stream.next()
        stream.synchronize()

    def _predict(self, token: int, layer: int) -> None:
        token, layer = token + layer // self.ids.shape[1], layer % self.ids.shape[1]
        if token < len(self.ids):
            self.cache.predict(layer, self.ids[token, layer].numpy())


def measure(
    name: str, geometry: Geometry, store: moeinf.ExpertStore, options: argparse.Namespace
) -> list[dict[str, Any]]:
    routing = decode_routing(
        options.trace,
        tokens=2 * options.tokens,
        layers=geometry.layers,
        experts=geometry.experts,
        top_k=geometry.top_k,
    )
    driver = FakeDriver()
    rows = []
    for exclusive, prefetch, share in CASES:
        driver.reset()
        perfect = prefetch == "perfect"
        cache = moeinf.ExpertCache(
            store,
            device="cuda",
            memory=SHARE,
            host_memory=REST if exclusive else "100%",
            exclusive=exclusive,
            prefetch="external" if perfect else prefetch,
        )
        # From the files into RAM; where the tiers are exclusive, until each expert is in one.
        for layer, expert in 2 * list(np.ndindex(store.num_layers, store.num_experts)):
            cache.acquire(layer, [expert]).release()
        compute_us = round(share * store.layout.nbytes / options.bandwidth * 1e6)
        replay = Replay(cache, routing, driver, perfect)
        driver.set_link(options.bandwidth)
        replay.run(0, options.tokens, compute_us)  # fills slots; predictors learn
        cache.reset_stats()
        rounds = []
        each = options.tokens // ROUNDS
        for first in range(options.tokens, options.tokens + ROUNDS * each, each):
            driver.reset()
            driver.set_link(options.bandwidth)
            start = time.perf_counter()
            replay.run(first, first + each, compute_us)
            seconds = time.perf_counter() - start
            moved = driver.library.fake_cuda_bytes(driver.TO_DEVICE)
            idle = gaps(driver.copies())
            rounds.append(
                {
                    "us_per_step": seconds / (each * geometry.layers) * 1e6,
                    "busy": driver.busy(driver.TO_DEVICE) / seconds,
                    "busy_out": driver.busy(driver.TO_HOST) / seconds,
                    "payload": moved / options.bandwidth / seconds,
                    **{kind: value / seconds for kind, value in idle.items()},
                }
            )
        stats = cache.stats()
        steps = ROUNDS * each * geometry.layers
        best = max(rounds, key=lambda one: one["busy"])
        rows.append(
            {
                "expert": name,
                "exclusive": exclusive,
                "prefetch": prefetch,
                "compute_us": compute_us,
                "hit_rate": stats["hit_rate"],
                "misses": stats["misses"] / steps,
                "files": stats["host"]["read_bytes"] / store.layout.nbytes / steps,
                "demoted": stats["host"]["demoted"] / steps,
                "fetched_ahead": stats["prefetch"] and stats["prefetch"]["fetched"],
                **best,
                "median_busy": statistics.median(one["busy"] for one in rounds),
                "us_per_step": statistics.median(one["us_per_step"] for one in rounds),
            }
        )
        del replay, cache
    return rows


COLUMNS = {
    "expert": ("expert", ""),
    "exclusive": ("exclusive", ""),
    "prefetch": ("prefetch", ""),
    "compute_us": ("compute us", "d"),
    "hit_rate": ("hit rate", ".3f"),
    "misses": ("misses/step", ".2f"),
    "demoted": ("demoted", ".2f"),
    "files": ("files", ".2f"),
    "fetched_ahead": ("fetched ahead", "d"),
    "us_per_step": ("us/step", ".0f"),
    "busy": ("busy", ".3f"),
    "median_busy": ("median", ".3f"),
    "payload": ("payload", ".3f"),
    "busy_out": ("busy back", ".3f"),
    "unasked": ("idle, unasked", ".3f"),
    "held": ("idle, held", ".3f"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where the results go")
    parser.add_argument("--trace", type=Path, help="a trace; the built-in model's without it")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--bandwidth", type=float, default=1e9, help="of the fake link, bytes/s")
    parser.add_argument("--folder", type=Path, help="where the random checkpoints are kept")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; numbers mean nothing")
    options = parser.parse_args(arguments)
    if options.tokens < ROUNDS:
        parser.error(f"--tokens: expected at least {ROUNDS}")
    if "MOEINF_CUDA_DRIVER" not in os.environ:
        sys.path.insert(0, str(ROOT / "tests"))
        from fake_cuda_library import fake_cuda_library

        os.environ["MOEINF_CUDA_DRIVER"] = str(fake_cuda_library())
    rows: list[dict[str, Any]] = []
    for name, geometry in (TINY if options.tiny else SIZES).items():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write_random_checkpoint(Path(folder), geometry)
            rows += measure(name, geometry, moeinf.ExpertStore.open(folder), options)
    print_table(rows, COLUMNS)
    if options.json:
        write_json(
            options.json,
            "link_busy",
            device="fake driver (tests/fake_cuda): no GPU was measured",
            bandwidth=options.bandwidth,
            latency_us=LATENCY_NS / 1e3,
            resident=SHARE,
            target=TARGET,
            tiny=options.tiny,
            rows=rows,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
