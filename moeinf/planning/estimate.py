"""Tokens per second, from what a token needs and what the machine does.

A token takes the time of its layers, of the bytes of its dense weights and of its experts, and it
waits for the experts that it misses: see `traces.time_model`. How many those are says a trace, or
a curve over the share of experts in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeinf import _core
from moeinf.checkpoint.layout import Layout
from moeinf.planning.model import ModelCosts
from moeinf.planning.rates import Rates
from moeinf.traces.simulator import SimulationResult, simulate
from moeinf.traces.time_model import estimate_time
from moeinf.traces.trace import Trace

# Hit rates of the policy "learned" while decoding, by the share of experts in slots: the lowest,
# the middle and the highest of the models in benchmarks/results/policies.json (Qwen3-30B-A3B,
# gemma-4-26B-A4B, GPT-OSS-20B, the built-in model). Beyond 30% none was measured: straight lines.
CURVE = {
    0.0: (0.0, 0.0, 0.0),
    0.05: (0.17, 0.34, 0.42),
    0.10: (0.32, 0.52, 0.60),
    0.20: (0.50, 0.72, 0.79),
    0.30: (0.63, 0.83, 0.89),
    1.0: (1.0, 1.0, 1.0),
}
PASSES = 200  # forward passes that stand for all, where no trace says which


@dataclass(frozen=True)
class Estimate:
    """Of one format and budget; `low` and `high` are None where a trace says how many hits."""

    format: str
    slots: int
    share: float
    memory_bytes: int
    hit_rate: float
    tokens_per_second: float
    low: float | None = None
    high: float | None = None


def hit_rates(share: float) -> tuple[float, float, float]:
    """The lowest, the middle and the highest that are likely at this share of all experts."""
    low, middle, high = (
        float(np.interp(share, list(CURVE), [one[i] for one in CURVE.values()])) for i in range(3)
    )
    return low, middle, high


def estimate(
    costs: ModelCosts,
    rates: Rates,
    format: str,
    layout: Layout,
    slots: int,
    trace: Trace | None = None,
    policy: str = "learned",
) -> Estimate:
    """With `slots` for all layers together. The trace is one of this model."""
    share = min(1.0, slots / costs.total_experts)
    if trace is not None:
        found = simulate(trace, slots=slots, policy=policy, keep_misses=True)
        rate = found.hit_rate_decode or 0.0
        speeds = [_speed(costs, rates, format, layout, found)]
    else:
        chances = hit_rates(share)
        rate = chances[1]
        speeds = [
            _speed(costs, rates, format, layout, _drawn(costs, slots, chance))
            for chance in (chances[1], chances[0], chances[2])
        ]
    return Estimate(
        format=format,
        slots=slots,
        share=share,
        memory_bytes=slots * layout.slot_bytes,
        hit_rate=rate,
        tokens_per_second=speeds[0],
        low=speeds[1] if speeds[1:] else None,
        high=speeds[2] if speeds[1:] else None,
    )


def check_trace(trace: Trace, costs: ModelCosts) -> None:
    """Raises ValueError unless the trace is of a model of this shape."""
    store = costs.stores[0]
    wanted = (sum(one.num_layers for one in costs.stores), store.num_experts, costs.top_k)
    found = (trace.num_layers, trace.num_experts, trace.experts.shape[2])
    if wanted != found:
        raise ValueError(
            f"{trace.name}: expected a trace of {wanted[0]} layers of {wanted[1]} experts, "
            f"{wanted[2]} per token, found {found[0]} of {found[1]}, {found[2]} per token"
        )


def _speed(
    costs: ModelCosts, rates: Rates, format: str, layout: Layout, result: SimulationResult
) -> float:
    """Tokens per second; without decode passes in the trace, 0."""
    moe_layers = sum(store.num_layers for store in costs.stores)
    dense = costs.dense_bytes / rates.dense
    expert = rates.expert_seconds[format]
    # Every layer has its operators; those without experts, and the dense bytes, are spread.
    alone = rates.layer_seconds * costs.layers / moe_layers + dense / moe_layers
    found = estimate_time(
        result,
        expert_bytes=layout.nbytes,
        link_bandwidth=rates.disk,
        compute_seconds_per_layer=alone + costs.top_k * expert,
        compute_seconds_per_expert=expert,
        latency_seconds=rates.read_seconds,
    )
    return 1 / found.seconds_per_token if found.seconds_per_token else 0.0


def _drawn(costs: ModelCosts, slots: int, hit_rate: float) -> SimulationResult:
    """Steps whose misses are drawn, each expert by itself."""
    layers = sum(store.num_layers for store in costs.stores)
    draw = np.random.default_rng(0)
    misses = draw.binomial(costs.top_k, 1 - hit_rate, (PASSES, layers)).astype(np.uint16)
    accesses = np.full(layers, PASSES * costs.top_k)
    zero = np.zeros(layers, dtype=np.int64)
    return SimulationResult(
        trace="a curve",
        policy="learned",
        slots=slots,
        decode_hits=accesses - misses.sum(0),
        decode_accesses=accesses,
        prefill_hits=zero,
        prefill_accesses=zero,
        evictions=zero,
        misses=misses,
        decode_pass=np.ones(PASSES, dtype=bool),
    )


@dataclass(frozen=True)
class Advice:
    """What to run: the format as it is, and the most exact one that is about as fast as any."""

    memory_bytes: int
    policy: str
    format: str
    tokens_per_second: float
    pack_format: str | None
    pack_tokens_per_second: float | None


# From the most exact on; formats that a checkpoint is in already are exact.
EXACT_FIRST = ("bf16-palette", "int8", "fp8", "int4", "nvfp4", "mxfp4")
AS_FAST = 0.9


def advise(estimates: list[Estimate], memory_bytes: int, policy: str) -> Advice:
    """From the estimates of one budget, its own format first."""
    own, *packs = estimates
    best = max(packs, key=lambda one: one.tokens_per_second, default=own)
    found = None
    if best.tokens_per_second * AS_FAST > own.tokens_per_second:
        near = [o for o in packs if o.tokens_per_second >= AS_FAST * best.tokens_per_second]
        found = min(near, key=lambda one: EXACT_FIRST.index(one.format))
    return Advice(
        memory_bytes=memory_bytes,
        policy=policy,
        format=own.format,
        tokens_per_second=own.tokens_per_second,
        pack_format=None if found is None else found.format,
        pack_tokens_per_second=None if found is None else found.tokens_per_second,
    )


def best_policy(trace: Trace | None, slots: int) -> str:
    """The policy with the most hits on the trace; without one, the default."""
    if trace is None or slots >= trace.total_experts:
        return "learned"
    policies = [name for name in _core.policy_names() if name != "eam"]
    rates = {p: simulate(trace, slots=slots, policy=p).hit_rate_decode or 0.0 for p in policies}
    return max(rates, key=lambda name: (rates[name], name == "learned"))
