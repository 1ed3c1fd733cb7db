"""Host time of the cache: a step of resident experts, and the decision of a step that misses.

    python benchmarks/cache_overhead.py --json benchmarks/results/cache_overhead.json

A hit is acquire and release of 8 resident experts, in a cache of 1,800 slots over 15 layers of 128
small experts. It is measured in C++ (begin_step, wait_ready, release for each), through the
compiled module, and through `moeinf.ExpertCache`. A miss is the planning of a step of 8 absent
experts with 1,800 residents of 48 layers of 128, for each policy: scores, 8 victims, updates. No
bytes move.
Recording is the time that `ExpertCache.record` adds to a step of one token, with its share of the
work per forward pass. With the router's probabilities it includes the hook and their softmax.
`moeinf.fused_experts` stands beside the kernel that it runs, called by the addresses of the same
slots, all resident; one token, bf16. A call takes other experts than the one before, so that their
weights come from memory. Both take turns at each call (--only-operator: nothing else).

The limits are the targets: 3 us in C++, 15 us from Python, 3 us for a decision. One attribute
access of the compiled module stands beside them, because no call can be cheaper. Other work on the
machine can only make a run slower, so each column is the best mean of all rounds, with the median
beside it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

import moeinf
from benchmarks.common import print_table, write_json
from benchmarks.random_checkpoint import Geometry, write_random_checkpoint
from moeinf import _core
from moeinf.cache.recorder import Recorder
from moeinf.experts.cpu import core_expert, default_engine
from moeinf.integrations.transformers.routers import listen

LAYERS, EXPERTS, TOP_K, SLOTS = 15, 128, 8, 1800
LAYERS_OF_MISSES = 48
OPERATOR_SHAPES = {"Qwen3-30B-A3B": (2048, 768), "tiny": (64, 32)}  # hidden, intermediate
OPERATOR_TARGET = 0.05  # of the kernel's time, at the first shape
STEPS_PER_ROUND = 500
CPP_TARGET, PYTHON_TARGET, DECISION_TARGET = 3e-6, 15e-6, 3e-6  # seconds
COLUMNS = {
    "what": ("", ""),
    "best_us": ("best us", ".3f"),
    "median_us": ("median us", ".3f"),
    "target_us": ("target us", ".0f"),
    "share_of_target": ("best / target", ".3f"),
}
OPERATOR_COLUMNS = {
    "model": ("experts of", ""),
    "operator_us": ("operator us", ".1f"),
    "kernel_us": ("kernel us", ".1f"),
    "overhead": ("overhead", ".3f"),
    "target": ("target", ".2f"),
}


def routed_blocks() -> list[Qwen3MoeSparseMoeBlock]:
    """MoE blocks whose routers answer at once, so that what is timed is the listening."""
    config = Qwen3MoeConfig(
        hidden_size=16, moe_intermediate_size=8, num_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    return [Qwen3MoeSparseMoeBlock(config) for _ in range(LAYERS)]


def mean_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(STEPS_PER_ROUND):
        call()
    return (time.perf_counter() - start) / STEPS_PER_ROUND


def decision(policy: str) -> float:
    return _core.time_cache_misses(
        policy, LAYERS_OF_MISSES, EXPERTS, SLOTS, TOP_K, 1, STEPS_PER_ROUND
    )[0]


def operator_overhead(model: str, calls: int) -> dict[str, object]:
    """A token through the operator, and through its kernel alone; medians of calls in turn."""
    hidden, intermediate = OPERATOR_SHAPES[model]
    gate_up = torch.empty(EXPERTS, 2 * intermediate, hidden, dtype=torch.bfloat16)
    down = torch.empty(EXPERTS, hidden, intermediate, dtype=torch.bfloat16)
    experts = {"gate_up": gate_up.normal_(std=0.02), "down": down.normal_(std=0.02)}
    store = moeinf.ExpertStore.from_tensors([experts], top_k=TOP_K)
    cache = moeinf.ExpertCache(store)
    with cache.acquire(0, range(EXPERTS)) as lease:
        address = cache.pool().data_ptr()
        slots = [address + slot * store.slot_bytes for slot in lease.slots]
    x = torch.randn(1, hidden).bfloat16()
    weights = torch.full((1, TOP_K), 1 / TOP_K)
    out = torch.empty_like(x)
    engine, expert = default_engine(), core_expert(store.form, store.layout)
    groups = torch.randperm(EXPERTS).reshape(-1, 1, TOP_K)
    sides: list[list[Callable[[], object]]] = [[], []]
    for ids in groups:
        given = _core.FfnInput(
            hidden=x.data_ptr(),
            hidden_dtype=_core.DType.bf16,
            topk_ids=ids.data_ptr(),
            ids_are_int64=True,
            topk_weights=weights.data_ptr(),
            topk_weights_dtype=_core.DType.f32,
            tokens=1,
            top_k=TOP_K,
            num_experts=EXPERTS,
        )
        sides[0].append(partial(moeinf.fused_experts, x, ids, weights, cache, 0))
        sides[1].append(
            partial(
                _core.fused_experts_raw, engine, expert, given, slots=slots,
                out=out.data_ptr(), out_dtype=_core.DType.bf16,
            )
        )  # fmt: skip
    seconds: list[list[float]] = [[], []]
    with torch.inference_mode():
        for call in range(2 * calls):
            lap, group = divmod(call, len(groups))
            side = (call + lap) % 2  # in the next lap the other one has this group
            start = time.perf_counter()
            sides[side][group]()
            seconds[side].append(time.perf_counter() - start)
    operator, kernel = map(statistics.median, seconds)
    return {
        "model": model,
        "operator_us": operator * 1e6,
        "kernel_us": kernel * 1e6,
        "best_us": [min(one) * 1e6 for one in seconds],
        "overhead": operator / kernel - 1,
        "target": OPERATOR_TARGET if hidden > 1000 else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--calls", type=int, default=2000, help="of the operator")
    parser.add_argument("--only-operator", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    operator = [operator_overhead(model, arguments.calls) for model in OPERATOR_SHAPES]
    if arguments.only_operator:
        print_table(operator, OPERATOR_COLUMNS)
        return

    geometry = Geometry(
        hidden=64, intermediate=32, experts=EXPERTS, top_k=TOP_K, layers=LAYERS, vocabulary=64
    )
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), geometry)
        package_cache = moeinf.ExpertCache(moeinf.ExpertStore.open(folder), slots=SLOTS)
        cache = package_cache.core
        ids = list(range(0, EXPERTS, EXPERTS // TOP_K))
        ids_array = np.array(ids)
        for layer in range(LAYERS):  # fills the slots; the step that is timed stays resident
            for first in range(0, EXPERTS, TOP_K):
                cache.acquire(layer, range(first, first + TOP_K))[0].release()
        layer = LAYERS - 1
        cache.acquire(layer, ids)[0].release()
        cache.reset_stats()

        def acquire(experts: object) -> None:
            lease, _ = cache.acquire(layer, experts)
            lease.release()

        def waves() -> None:
            lease = cache.begin_step(layer, ids)
            while (ready := lease.wait_ready()) is not None:
                for position, _ in ready:
                    lease.release(position)
            lease.release()

        def package() -> None:
            package_cache.acquire(layer, ids).release()

        recorder = Recorder(LAYERS, EXPERTS)
        routed = torch.tensor([ids])
        weights = torch.full((1, TOP_K), 1 / TOP_K, dtype=torch.bfloat16)

        def record_pass() -> None:
            recorder.begin_pass(moeinf.ForwardPass())
            for recorded in range(LAYERS):
                recorder.add(recorded, routed, weights)

        def recording() -> float:
            return mean_seconds(record_pass) / LAYERS

        with_router = Recorder(LAYERS, EXPERTS, router=True)
        blocks = routed_blocks()
        listen(blocks, with_router.add_router)
        hidden = torch.randn(1, 16)
        for block in blocks:
            block.gate.forward = partial(lambda answer, _: answer, block.gate(hidden))

        def record_router_pass() -> None:
            with_router.begin_pass(moeinf.ForwardPass())
            for recorded, block in enumerate(blocks):
                block.gate(hidden)
                with_router.add(recorded, routed, weights)

        cases: list[tuple[str, float | None, Callable[[], float]]] = [
            (
                "8 hits, C++",
                CPP_TARGET,
                lambda: _core.time_cache_hits(cache, layer, ids, 1, STEPS_PER_ROUND)[0],
            ),
            ("8 hits, module, list", PYTHON_TARGET, lambda: mean_seconds(lambda: acquire(ids))),
            (
                "8 hits, module, array",
                PYTHON_TARGET,
                lambda: mean_seconds(lambda: acquire(ids_array)),
            ),
            ("8 hits, module, next and done", PYTHON_TARGET, lambda: mean_seconds(waves)),
            ("8 hits, moeinf.ExpertCache", PYTHON_TARGET, lambda: mean_seconds(package)),
            ("recording a step", None, recording),
            (
                "recording a step, router too",
                None,
                lambda: mean_seconds(record_router_pass) / LAYERS,
            ),
            ("one call of the module", None, lambda: mean_seconds(lambda: cache.slot_bytes)),
        ]
        for policy in _core.policy_names():
            cases.append((f"8 misses, {policy}", DECISION_TARGET, partial(decision, policy)))
        seconds: list[list[float]] = [[] for _ in cases]
        for _ in range(arguments.rounds):
            for values, (_, _, measure) in zip(seconds, cases, strict=True):
                values.append(measure())
        if cache.stats()[layer]["misses"]:
            raise RuntimeError("a step that was timed as a hit has missed")

    rows = []
    for values, (name, target, _) in zip(seconds, cases, strict=True):
        best = min(values)
        rows.append(
            {
                "what": name,
                "best_us": best * 1e6,
                "median_us": statistics.median(values) * 1e6,
                "target_us": None if target is None else target * 1e6,
                "share_of_target": None if target is None else best / target,
            }
        )
    print_table(rows, COLUMNS)
    print_table(operator, OPERATOR_COLUMNS)
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
            operator=operator,
        )


if __name__ == "__main__":
    main()
