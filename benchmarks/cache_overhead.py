"""What the cache itself costs: a step of resident experts, and the decision of a step that misses.

    python benchmarks/cache_overhead.py --json benchmarks/results/cache_overhead.json

A hit is acquire + release of 8 resident experts in a cache of 1,800 slots over 48 layers of 128
experts: in C++ (begin, next, done for each, release), through the compiled module, and through
`moeinf.ExpertCache` where its store can be opened. A miss is the planning of a step of 8 absent
experts with 1,800 residents, per policy: score, choose 8 victims, update; no bytes move.

The limits are the targets: 3 us in C++, 15 us from Python, 3 us for a decision. Beside them stand
what no cache can avoid: one call into the compiled module, and one `getpid` (each entry asks
whether the process was forked). Other load only ever slows a run down, so each column is the best
mean of all rounds, with the median beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.common import print_table, write_json
from moeinf import _core

LAYERS, EXPERTS, TOP_K, SLOTS = 48, 128, 8, 1800
STEPS_PER_ROUND = 500
TARGETS = {"c++": 3e-6, "python": 15e-6, "decision": 3e-6}


def small_catalog(folder: Path) -> _core.Catalog:
    """6,144 experts of one page, all at the same place of one file: the bytes do not matter."""
    path = folder / "experts.bin"
    path.write_bytes(os.urandom(4096))
    extents = np.tile(np.array([0, 0, 4096, 0], dtype=np.uint64), (LAYERS * EXPERTS, 1, 1))
    return _core.Catalog(LAYERS, EXPERTS, 4096, [(str(path), 4096)], extents)


def mean_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(STEPS_PER_ROUND):
        call()
    return (time.perf_counter() - start) / STEPS_PER_ROUND


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        cache = _core.ExpertCache(small_catalog(Path(folder)), SLOTS, "lrfu")
        ids = list(range(0, EXPERTS, EXPERTS // TOP_K))
        ids_array = np.array(ids)
        for layer in range(LAYERS):  # fills the slots; the step that is timed stays resident
            for first in range(0, EXPERTS, TOP_K):
                cache.acquire(layer, range(first, first + TOP_K))[0].release()
        layer = LAYERS - 1
        cache.acquire(layer, ids)[0].release()

        def acquire(experts: object) -> None:
            lease, _ = cache.acquire(layer, experts)
            lease.release()

        def waves() -> None:
            lease = cache.begin(layer, ids)
            while (ready := lease.next()) is not None:
                for position, _ in ready:
                    lease.done(position)
            lease.release()

        seconds: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            cases: list[tuple[str, Callable[[], float]]] = [
                (
                    "8 hits, C++",
                    lambda: _core.time_cache_hits(cache, layer, ids, 1, STEPS_PER_ROUND)[0],
                ),
                ("8 hits, Python, list", lambda: mean_seconds(lambda: acquire(ids))),
                ("8 hits, Python, array", lambda: mean_seconds(lambda: acquire(ids_array))),
                ("8 hits, Python, next/done", lambda: mean_seconds(waves)),
                ("one call of the module", lambda: mean_seconds(lambda: cache.slot_bytes)),
                ("one getpid", lambda: mean_seconds(os.getpid)),
            ]
            for policy in _core.policy_names():
                cases.append(
                    (
                        f"8 misses, decision, {policy}",
                        lambda policy=policy: _core.time_cache_misses(
                            policy, LAYERS, EXPERTS, SLOTS, TOP_K, 1, STEPS_PER_ROUND
                        )[0],
                    )
                )
            for name, measure in cases:
                seconds.setdefault(name, []).append(measure())
        stats = cache.stats()[layer]
        assert stats["misses"] <= EXPERTS + TOP_K, "the timed steps must hit"

    rows = []
    for name, values in seconds.items():
        target = next(
            (t for word, t in TARGETS.items() if word in name.lower().replace(",", " ")), None
        )
        best, median = min(values), statistics.median(values)
        rows.append(
            {
                "what": name,
                "best_us": round(best * 1e6, 3),
                "median_us": round(median * 1e6, 3),
                "target_us": None if target is None else target * 1e6,
                "share_of_target": None if target is None else round(best / target, 3),
            }
        )
    print_table(rows)
    if arguments.json:
        write_json(
            arguments.json,
            "cache_overhead",
            layers=LAYERS,
            experts=EXPERTS,
            top_k=TOP_K,
            slots=SLOTS,
            rounds=arguments.rounds,
            steps_per_round=STEPS_PER_ROUND,
            rows=rows,
        )


if __name__ == "__main__":
    main()
