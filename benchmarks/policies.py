"""Policies: hit rates on traces, the distance to Belady, decisions per second, EAM queries.

    python -m benchmarks.policies [TRACE...] [--long] [--json FILE]

For each given trace, and for traces that it records from the built-in model, it prints the decode
hit rate of each policy by budget. It also prints the share closed of the distance from the better
of lru and lfu to Belady, whose limit is measured in the same run, and the lead of the default
policy over the best of the others, in points. Then follow the simulator's speed on a synthetic 48 x
128 model with 10% of the experts in slots (CPU time of one core, the best of several runs in turn),
and the time of an EAM query over 1,000 entries.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import moeinf
from benchmarks.common import print_table, write_json
from benchmarks.recorded_traces import record_traces
from moeinf import _core
from moeinf.traces.simulator import policy_names
from moeinf.traces.trace import Trace

SHARES = ("5%", "10%", "20%", "30%")
LAYERS, EXPERTS, TOP_K = 48, 128, 8
SLOTS = 614
ROUNDS = 5


def synthetic_trace(tokens: int) -> Trace:
    """Skewed and persistent routing of a 48 x 128 model, top 8."""
    rng = np.random.default_rng(0)
    popularity = rng.gumbel(size=(LAYERS, EXPERTS)).astype(np.float32)
    mood = rng.standard_normal((LAYERS, EXPERTS), dtype=np.float32)
    experts = np.empty((tokens, LAYERS, TOP_K), np.int16)
    for token in range(tokens):
        mood = 0.7 * mood + 0.7 * rng.standard_normal(mood.shape, dtype=np.float32)
        experts[token] = np.argpartition(-(popularity + 1.2 * mood), TOP_K, axis=1)[:, :TOP_K]
    return Trace.from_arrays(experts, num_experts=EXPERTS, name="synthetic")


def hit_rates(trace: Trace) -> list[dict[str, Any]]:
    rates = {
        policy: [moeinf.simulate(trace, policy=policy, slots=s).hit_rate_decode for s in SHARES]
        for policy in policy_names()
    }
    rows = []
    for policy, of_policy in rates.items():
        row: dict[str, Any] = {"trace": trace.name, "policy": policy}
        closed = []
        for i, share in enumerate(SHARES):
            base = max(rates["lru"][i], rates["lfu"][i])
            closed.append((of_policy[i] - base) / (rates["belady"][i] - base))
            row[share] = round(100 * of_policy[i], 2)
        row["closed"] = round(float(np.mean(closed[1:])), 3)  # mean over 10, 20 and 30%
        rows.append(row)
    return rows


def leads(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points by which `learned` leads the best other policy but Belady, by trace and budget."""
    by_trace: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_trace.setdefault(row["trace"], {})[row["policy"]] = row
    return [
        {"trace": trace}
        | {
            share: round(
                of["learned"][share]
                - max(row[share] for name, row in of.items() if name not in ("learned", "belady")),
                2,
            )
            for share in SHARES
        }
        for trace, of in by_trace.items()
    ]


def speeds() -> list[dict[str, Any]]:
    trace = synthetic_trace(1000)
    accesses = trace.experts.size
    best: dict[str, float] = {}
    for _ in range(ROUNDS):
        for policy in policy_names():
            start = time.process_time()
            moeinf.simulate(trace, policy=policy, slots=SLOTS)
            best[policy] = min(best.get(policy, np.inf), time.process_time() - start)
    return [
        {
            "policy": policy,
            "million_accesses_per_s": round(accesses / seconds / 1e6, 2),
            "us_per_step": round(seconds / (accesses / TOP_K) * 1e6, 2),
        }
        for policy, seconds in best.items()
    ]


def query_us(entries: int) -> float:
    """Microseconds to add a row of 8 experts and name the nearest 3, in a mean over 48 layers."""
    rng = np.random.default_rng(0)
    collection = _core.EamCollection(LAYERS, EXPERTS, entries)
    for _ in range(entries):
        collection.add(rng.integers(0, 9, (LAYERS, EXPERTS)).astype(np.float32))
    match = _core.EamMatch(collection)
    rows = [
        (layer * EXPERTS + rng.choice(EXPERTS, TOP_K, replace=False)).astype(np.int32)
        for layer in range(LAYERS)
    ]
    ones = np.ones(TOP_K, np.int32)
    best = np.inf
    for _ in range(50):
        match.restart()
        start = time.perf_counter()
        for layer, row in enumerate(rows):
            match.add_row(layer, row, ones)
            match.nearest(3)
        best = min(best, (time.perf_counter() - start) / LAYERS)
    return round(best * 1e6, 2)


def long_trace() -> dict[str, float]:
    """A million tokens: seconds, and the peak memory of this process in GiB."""
    part = synthetic_trace(2000).experts
    trace = Trace.from_arrays(np.tile(part, (500, 1, 1)), num_experts=EXPERTS, name="long")
    start = time.perf_counter()
    moeinf.simulate(trace, policy="lru", slots=SLOTS)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"tokens": trace.num_tokens, "seconds": round(seconds, 1), "peak_gib": round(peak, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--long", action="store_true", help="also a trace of a million tokens")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    traces = []
    for path in arguments.traces:
        trace = Trace.load(path)
        if trace.num_tokens > 10_000:
            first = trace.tokens(0, 2500)
            traces.append(replace(first, name=f"{trace.name}, first 2,500 tokens"))
        traces.append(trace)
    results: dict[str, Any] = {"hit_rates": []}
    for trace in traces + record_traces():
        results["hit_rates"] += hit_rates(trace)
    results["leads"] = leads(results["hit_rates"])
    budgets = {share: (share, ".2f") for share in SHARES}
    columns = {"trace": ("trace", ""), "policy": ("policy", "")} | budgets
    print_table(results["hit_rates"], columns | {"closed": ("closed 10-30%", ".3f")})
    print_table(results["leads"], {"trace": ("best is ahead by", "")} | budgets)
    results["speed"] = speeds()
    print_table(
        results["speed"],
        {
            "policy": ("policy", ""),
            "million_accesses_per_s": ("million accesses/s", ".2f"),
            "us_per_step": ("us/step of 8", ".2f"),
        },
    )
    results["eam_query_us"] = query_us(1000)
    print(f"EAM query over 1,000 entries: {results['eam_query_us']} us")
    if arguments.long:
        results["long"] = long_trace()
        print(f"a million tokens: {results['long']}")
    if arguments.json:
        write_json(arguments.json, "policies", **results)


if __name__ == "__main__":
    main()
