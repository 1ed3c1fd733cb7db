"""The simulator's time model against live runs: time per token, estimated and measured.

    python -m benchmarks.time_model --json benchmarks/results/time_model.json

A checkpoint (by default the built-in model) decodes the same prompts greedily and records its
routing, at several budgets and with every expert resident. The budgets take turns, so other work
affects all of them alike. Between them the inputs of the model are measured: the time of a layer,
by the resident model; the time of an expert, by the kernels on resident experts; latency and
bandwidth, by a run of the resident model in which every MoE layer also reads 0..k experts into
slots of another cache (the line through the added times). Each recorded trace is simulated, and the
estimate for each prompt is divided by its live time.

"Waiting" is the time of a token beyond that of the resident model. The cache's own stall counter
stands beside it. It sees only the waiting with nothing ready to compute, not the cost of starting
reads and of sharing cores with them. Three models are compared: misses by bandwidth alone, the
whole model, and the whole model with reads timed on an idle machine. The limit is a ratio of 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moeinf
from benchmarks.common import print_table, write_json
from benchmarks.prefetch import prompts_for
from benchmarks.random_checkpoint import Geometry, write_random_checkpoint
from moeinf.cache.passes import Passes
from moeinf.experts.cpu import CpuExperts
from moeinf.pocket import POCKET
from moeinf.traces.time_model import TimeEstimate, estimate_time

RESIDENT = "100%"
PROBES = 20  # per number of experts, before each prompt
COLUMNS = {
    "memory": ("memory", ""),
    "hit_rate": ("hit rate", ".1%"),
    "live_ms": ("live ms/token", ".3f"),
    "estimated_ms": ("estimated", ".3f"),
    "ratio": ("ratio", ".2f"),
    "ratio_low": ("lowest", ".2f"),
    "ratio_high": ("highest", ".2f"),
    "bandwidth_only_ratio": ("by bandwidth", ".2f"),
    "idle_ratio": ("by idle reads", ".2f"),
    "live_waiting_ms": ("live waiting ms", ".3f"),
    "estimated_waiting_ms": ("estimated", ".3f"),
    "counted_stall_ms": ("stall counter", ".3f"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=POCKET)
    parser.add_argument("--random", action="store_true", help="random weights of a large geometry")
    parser.add_argument("--dir", type=Path, default=Path("build/bench"), help="for random weights")
    parser.add_argument("--layers", type=int, default=4, help="of random weights")
    parser.add_argument("--experts", type=int, default=32, help="per layer of random weights")
    parser.add_argument("--memory", nargs="+", default=["5%", "12.5%", "25%", "50%"])
    parser.add_argument("--policy", default="learned")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    folder = arguments.checkpoint
    if arguments.random:
        folder = arguments.dir / f"prefetch-{arguments.layers}-layers-{arguments.experts}-experts"
        geometry = Geometry(layers=arguments.layers, experts=arguments.experts)
        write_random_checkpoint(folder, geometry)
    told, rows = measure(folder, arguments)
    print(
        f"a layer {told['layer_us']:.0f} us, an expert {told['expert_us']:.1f} us of it; "
        f"reading {told['expert_bytes'] / 1e3:.0f} kB: "
        f"{told['latency_us']:.0f} us and {told['bandwidth_gb_s']:.2f} GB/s between layers, "
        f"{told['idle_latency_us']:.0f} us and {told['idle_bandwidth_gb_s']:.2f} GB/s when idle"
    )
    print_table(rows, COLUMNS)
    if arguments.json:
        write_json(
            arguments.json,
            "time_model",
            checkpoint=folder.name,
            policy=arguments.policy,
            prompts=arguments.prompts,
            tokens=arguments.tokens,
            told=told,
            rows=rows,
        )


def measure(
    folder: Path, arguments: argparse.Namespace
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    budgets = [*arguments.memory, RESIDENT]
    models: dict[str, Any] = {
        memory: moeinf.load(folder, memory=memory, policy=arguments.policy) for memory in budgets
    }
    caches = {memory: model.moeinf.cache for memory, model in models.items()}
    _fill(caches[RESIDENT])
    prompts = prompts_for(folder, models[RESIDENT].config.vocab_size, arguments.prompts + 1)
    recorders = {memory: cache.record() for memory, cache in caches.items()}
    probes = Probes(models[RESIDENT])
    live: dict[str, list[tuple[float, float]]] = {memory: [] for memory in budgets}
    for number, prompt in enumerate(prompts, -1):  # the first only warms up
        probes.run(prompt, arguments.tokens)
        shift = number % len(budgets)
        for memory in budgets[shift:] + budgets[:shift]:
            spent = decode(models[memory], prompt, arguments.tokens)
            if number >= 0:
                live[memory].append(spent)
    layers = caches[RESIDENT].store.num_layers
    told = probes.result()
    told["layer_us"] = statistics.median(total for total, _ in live[RESIDENT]) / layers * 1e6
    rows = [
        _row(
            memory,
            recorders[memory].trace(),
            caches[memory].slots,
            arguments,
            told,
            live[memory],
            [total / layers for total, _ in live[RESIDENT]],
        )
        for memory in arguments.memory
    ]
    return told, rows


def decode(
    model: Any, prompt: torch.Tensor, tokens: int, between: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """Seconds and counted seconds of stall per token, of all tokens after the first."""
    times: list[float] = []
    stalls: list[float] = []

    class Clock:
        def put(self, value: torch.Tensor) -> None:
            if len(times) in (1, tokens):  # the first token and the last; 0 is the prompt itself
                stalls.append(model.moeinf.stats()["stall_seconds"])
            times.append(time.perf_counter())
            between()

        def end(self) -> None:
            pass

    with torch.inference_mode():
        model.generate(
            prompt,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=Clock(),
            pad_token_id=0,
        )
    count = tokens - 1
    return (times[-1] - times[1]) / count, (stalls[1] - stalls[0]) / count


class Probes:
    """Times of what the model is told, with a resident model and a small cache beside it."""

    def __init__(self, model: Any):
        self.model = model
        self.store = model.moeinf.cache.store
        self.experts = CpuExperts(model.moeinf.cache)
        self.experts.passes = Passes([])  # the cache's recorder is for the model's own steps
        self.top_k = int(model.config.num_experts_per_tok)
        self.other = moeinf.ExpertCache(self.store, slots=self.top_k, policy="lru")
        self.turn = [0] * self.store.num_layers  # which experts a layer's next read begins with
        counts = range(self.top_k + 1)
        self.tokens: list[list[float]] = [[] for _ in counts]  # by experts read at every layer
        self.reads: list[list[float]] = [[] for _ in counts]
        self.computes: list[list[float]] = [[] for _ in counts]
        self.hidden = torch.randn(1, self.store.layout["down"].shape[0], dtype=torch.bfloat16)

    def run(self, prompt: torch.Tensor, tokens: int) -> None:
        for number in range(PROBES * self.top_k):
            layer, count = number % self.store.num_layers, 1 + number % self.top_k
            self.reads[count].append(_seconds(partial(self._read, layer, count)))
            self.computes[count].append(_seconds(partial(self._compute, layer, count)))
        self._read_between_layers(prompt, tokens)

    def _read_between_layers(self, prompt: torch.Tensor, tokens: int) -> None:
        count = 0
        last = time.perf_counter()

        def next_count() -> None:
            nonlocal count, last
            now = time.perf_counter()
            self.tokens[count].append(now - last)
            last, count = now, (count + 1) % (self.top_k + 1)

        def before(module: Any, _: Any) -> None:
            if count:
                self._read(module.moeinf_layer, count)

        hooks = [
            module.register_forward_pre_hook(before)
            for module in self.model.modules()
            if hasattr(module, "moeinf_layer")
        ]
        decode(self.model, prompt, tokens, next_count)
        for hook in hooks:
            hook.remove()

    def _next_ids(self, layer: int, count: int) -> list[int]:
        """Experts of a layer in turn: at twice top-k experts or more, none that `other` holds."""
        first = self.turn[layer]
        self.turn[layer] += count
        return [(first + i) % self.store.num_experts for i in range(count)]

    def _read(self, layer: int, count: int) -> None:
        self.other.acquire(layer, self._next_ids(layer, count)).release()

    def _compute(self, layer: int, count: int) -> None:
        ids, weights = torch.tensor([self._next_ids(layer, count)]), torch.ones(1, count)
        self.experts.run(self.hidden, ids, weights, layer)

    def result(self) -> dict[str, float]:
        medians = [statistics.median(one) for one in self.tokens]
        layers = self.store.num_layers
        read, latency = _line([(one - medians[0]) / layers for one in medians[1:]])
        idle_read, idle_latency = _line([statistics.median(one) for one in self.reads[1:]])
        compute, _ = _line([statistics.median(one) for one in self.computes[1:]])
        nbytes = self.store.layout.nbytes
        k = self.top_k
        return {
            "expert_bytes": nbytes,
            "expert_us": compute * 1e6,
            "latency_us": latency * 1e6,
            "bandwidth_gb_s": nbytes / read / 1e9,
            "bandwidth_of_k_gb_s": k * nbytes / (latency + k * read) / 1e9,
            "idle_latency_us": idle_latency * 1e6,
            "idle_bandwidth_gb_s": nbytes / idle_read / 1e9,
        }


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _line(times: list[float]) -> tuple[float, float]:
    """Slope and intercept, neither below 0, of the times of 1, 2, ... experts."""
    slope, intercept = np.polyfit(range(1, len(times) + 1), times, 1)
    return max(float(slope), 1e-9), max(float(intercept), 0.0)


def _row(
    memory: str,
    trace: moeinf.Trace,
    slots: int,
    arguments: argparse.Namespace,
    told: dict[str, float],
    live: list[tuple[float, float]],
    layer_seconds: list[float],
) -> dict[str, Any]:
    result = moeinf.simulate(trace, policy=arguments.policy, slots=slots, keep_misses=True)
    assert result.misses is not None and result.decode_pass is not None
    by_prompt = result.misses[result.decode_pass].reshape(
        arguments.prompts + 1, arguments.tokens - 1, -1
    )[1:]
    estimates: dict[str, list[TimeEstimate]] = {"whole": [], "bandwidth_only": [], "idle": []}
    for misses, layer in zip(by_prompt, layer_seconds, strict=True):
        prompt = replace(
            result,
            misses=misses,
            decode_pass=np.ones(len(misses), dtype=bool),
            decode_accesses=np.full(misses.shape[1], len(misses) * trace.experts.shape[2]),
        )
        estimate = partial(
            estimate_time,
            prompt,
            expert_bytes=told["expert_bytes"],
            compute_seconds_per_layer=layer,
        )
        expert = told["expert_us"] / 1e6
        estimates["bandwidth_only"].append(
            estimate(link_bandwidth=told["bandwidth_of_k_gb_s"] * 1e9)
        )
        for kind, prefix in (("whole", ""), ("idle", "idle_")):
            estimates[kind].append(
                estimate(
                    link_bandwidth=told[f"{prefix}bandwidth_gb_s"] * 1e9,
                    latency_seconds=told[f"{prefix}latency_us"] / 1e6,
                    compute_seconds_per_expert=expert,
                )
            )
    ratios = {
        kind: [e.seconds_per_token / total for e, (total, _) in zip(values, live, strict=True)]
        for kind, values in estimates.items()
    }
    whole = estimates["whole"]
    computing = [layer * trace.num_layers for layer in layer_seconds]
    waiting = [total - alone for (total, _), alone in zip(live, computing, strict=True)]
    return {
        "memory": memory,
        "hit_rate": result.hit_rate_decode,
        "live_ms": statistics.median(total for total, _ in live) * 1e3,
        "estimated_ms": statistics.median(e.seconds_per_token for e in whole) * 1e3,
        "ratio": statistics.median(ratios["whole"]),
        "ratio_low": min(ratios["whole"]),
        "ratio_high": max(ratios["whole"]),
        "bandwidth_only_ratio": statistics.median(ratios["bandwidth_only"]),
        "idle_ratio": statistics.median(ratios["idle"]),
        "live_waiting_ms": statistics.median(waiting) * 1e3,
        "estimated_waiting_ms": statistics.median(e.stall_seconds_per_token for e in whole) * 1e3,
        "counted_stall_ms": statistics.median(stall for _, stall in live) * 1e3,
    }


def _fill(cache: moeinf.ExpertCache) -> None:
    for layer in range(cache.store.num_layers):
        for lease in cache.waves(layer, list(range(cache.store.num_experts))):
            lease.release()


if __name__ == "__main__":
    main()
