"""Replays traces against policies and budgets, counting exactly as the live cache does.

The work is done in C++ by the classes of the live cache; this module checks arguments and names the
results. A time model on top turns misses into an estimate of stall and time per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moeinf import _core
from moeinf.traces.eam import EAMC
from moeinf.traces.priors import GuardedHook, PriorsHook
from moeinf.traces.trace import DECODE, PREFILL, Trace

Array = npt.NDArray[Any]


class SimulatedPolicy(Protocol):
    """A whole policy in Python, for research: far too slow for the live cache."""

    def observe(self, step: Any) -> None:
        """Sees every step before its misses are placed.

        `step` has index, layer, experts (distinct flat ids, int32), counts (tokens routed to each),
        router (float32 [num_experts] or None), prefill and new_sequence.
        """

    def score(self, residents: Array) -> Array:
        """One number for each of the flat ids that may leave; the lowest leave first."""


@dataclass(frozen=True)
class SimulationResult:
    """Counts of one trace, policy and budget. Arrays are int64 [layers]."""

    trace: str
    policy: str
    slots: int
    decode_hits: Array
    decode_accesses: Array
    prefill_hits: Array
    prefill_accesses: Array
    evictions: Array
    misses: Array | None = None
    """uint16 [passes, layers], misses of every step in order, where asked for."""
    decode_pass: Array | None = None
    """bool [passes], where asked for."""

    @property
    def hits(self) -> int:
        return int(self.decode_hits.sum() + self.prefill_hits.sum())

    @property
    def accesses(self) -> int:
        return int(self.decode_accesses.sum() + self.prefill_accesses.sum())

    @property
    def hit_rate_decode(self) -> float | None:
        """Hits per access of decode steps; None without any."""
        return _rate(self.decode_hits.sum(), self.decode_accesses.sum())

    @property
    def hit_rate_all(self) -> float | None:
        return _rate(self.hits, self.accesses)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "trace": self.trace,
            "policy": self.policy,
            "slots": self.slots,
            "hit_rate_decode": self.hit_rate_decode,
            "hit_rate_all": self.hit_rate_all,
            "hits": self.hits,
            "accesses": self.accesses,
            "decode_hits": int(self.decode_hits.sum()),
            "decode_accesses": int(self.decode_accesses.sum()),
            "evictions": int(self.evictions.sum()),
            "layers": [
                {"hits": int(h), "accesses": int(a)}
                for h, a in zip(
                    self.decode_hits + self.prefill_hits,
                    self.decode_accesses + self.prefill_accesses,
                    strict=True,
                )
            ],
        }


def policy_names() -> list[str]:
    """Every policy the simulator knows: those of the live cache, and belady."""
    return [*_core.policy_names(), "belady"]


def parse_slots(slots: int | str, total_experts: int) -> int:
    """A count, or a share of all experts such as "5%" rounded to the nearest count, half up.

    Raises ValueError for what is neither, or comes to less than one slot.
    """
    text = str(slots).strip()
    try:
        if text.endswith("%"):
            share = float(text[:-1])
            count = int(total_experts * share / 100 + 0.5) if 0 <= share <= 1e6 else -1
        else:
            count = int(text)
    except ValueError:
        raise ValueError(f"slots: expected a count or a share like '5%', found {text!r}") from None
    if not 1 <= count < 2**31:
        raise ValueError(
            f"slots: expected 1 to {2**31 - 1}, found {text!r} ({count} of {total_experts} experts)"
        )
    return count


def simulate(
    trace: Trace | str | Path,
    *,
    slots: int | str,
    policy: str | SimulatedPolicy = "learned",
    eamc: EAMC | None = None,
    priors: PriorsHook | None = None,
    progress: Callable[[int, int], None] | None = None,
    keep_misses: bool = False,
) -> SimulationResult:
    """Counts the hits of a policy over a trace, with one pool of `slots` for all layers.

    policy       a name of policy_names(), or an object like SimulatedPolicy
    slots        a count, or a share of all experts like "10%"
    eamc         the collection `eam` starts from; without one it starts from nothing
    priors       a hook asked once per forward pass; the policies that use priors are told them
    progress     called now and then with (tokens done, tokens in all)
    keep_misses  also return the misses of every step, which estimate_time() needs

    Raises ValueError for an unknown policy, fewer than one slot, or a collection of another shape
    or for another policy; TraceError for a bad trace.
    """
    if not isinstance(trace, Trace):
        trace = Trace.load(trace)
    count = parse_slots(slots, trace.total_experts)
    if isinstance(policy, str) and policy not in policy_names():
        raise ValueError(f"no policy is named {policy!r}; there are: {', '.join(policy_names())}")
    if eamc is not None and policy != "eam":
        raise ValueError(f"a collection is for the policy 'eam', found policy={policy!r}")
    counts = _core.simulate(
        trace.experts,
        trace.sequence,
        trace.phase,
        None if trace.router is None else trace.router.view(np.uint16),
        trace.num_experts,
        policy,
        count,
        None if eamc is None else eamc.to_core(),
        None if priors is None else _ask(trace, priors),
        None if progress is None else lambda done: progress(done, trace.num_tokens),
        keep_misses,
    )
    misses = counts.pop("step_misses", None)
    return SimulationResult(
        trace=trace.name,
        policy=policy if isinstance(policy, str) else type(policy).__name__,
        slots=count,
        misses=None if misses is None else misses.reshape(-1, trace.num_layers),
        decode_pass=_decode_passes(trace) if keep_misses else None,
        **counts,
    )


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds per decode token."""

    seconds_per_token: float
    stall_seconds_per_token: float
    compute_seconds_per_token: float


def estimate_time(
    result: SimulationResult,
    *,
    expert_bytes: float,
    link_bandwidth: float,
    compute_seconds_per_layer: float,
    compute_seconds_per_expert: float = 0.0,
    latency_seconds: float = 0.0,
    disk_bandwidth: float | None = None,
    disk_share: float = 0.0,
    prefetch_window: int = 0,
) -> TimeEstimate:
    """Estimates the time of decode tokens from the misses of a simulation with keep_misses.

    A miss takes c = expert_bytes / link_bandwidth seconds of the link, and the share `disk_share`
    of the misses, those that the tier below does not hold either, expert_bytes / disk_bandwidth
    more. Copies run one after the other in order of need, and each arrives `latency_seconds` after
    its last byte could: with small experts that is most of what a miss costs. Those of a step may
    start `prefetch_window` layers before it, as if predicted without fault, and not before.

    compute_seconds_per_layer is all of a layer, compute_seconds_per_expert the part of it that each
    of a step's k experts takes (k: the mean of the decode steps). Experts are computed as they
    arrive, those that are resident meanwhile. With m the misses of step s, T(s) when computation
    reaches its experts, B(s) when its copies begin and W(s) what it waits:

        B(s) = max(B(s - 1) + m(s - 1) * c, T(s - window))
        W(s) = max(0, B(s) + latency + c - T(s) - (k - m) * expert,      the first miss
                      B(s) + latency + m * c - T(s) - (k - 1) * expert)  the last
        T(s + 1) = T(s) + W(s) + compute_seconds_per_layer

    W(s) = 0 without misses; the sum of W is stall. Latency and bandwidth are best measured while
    the model computes, for reads and computing share cores: see `benchmarks/time_model.py`.
    Bandwidths in bytes per second. Raises ValueError without misses, or for values out of range.
    """
    if result.misses is None or result.decode_pass is None:
        raise ValueError("estimate_time needs a simulation with keep_misses=True")
    if not 0 <= disk_share <= 1:
        raise ValueError(f"disk_share: expected 0 to 1, found {disk_share}")
    not_negative = {
        "compute_seconds_per_layer": compute_seconds_per_layer,
        "compute_seconds_per_expert": compute_seconds_per_expert,
        "latency_seconds": latency_seconds,
        "prefetch_window": prefetch_window,
    }
    for name, value in not_negative.items():
        if not value >= 0:
            raise ValueError(f"{name}: expected 0 or more, found {value}")
    positive = {"expert_bytes": expert_bytes, "link_bandwidth": link_bandwidth}
    if disk_share > 0:
        positive["disk_bandwidth"] = disk_bandwidth or 0.0
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name}: expected more than 0, found {value}")
    copy = expert_bytes / link_bandwidth
    if disk_bandwidth:
        copy += disk_share * expert_bytes / disk_bandwidth
    misses = result.misses[result.decode_pass]
    tokens = len(misses)
    if tokens == 0:
        return TimeEstimate(0.0, 0.0, 0.0)
    experts = float(result.decode_accesses.sum()) / misses.size
    expert = compute_seconds_per_expert
    reached = [0.0] * (prefetch_window + 1)  # T of the latest steps, newest last
    link_free = stall = 0.0
    for count in misses.ravel().tolist():
        now = reached[-1]
        wait = 0.0
        if count:
            arrives = max(link_free, reached[0]) + latency_seconds
            first = arrives + copy - max(experts - count, 0.0) * expert
            last = arrives + count * copy - max(experts - 1, 0.0) * expert
            wait = max(0.0, first - now, last - now)
            link_free = arrives - latency_seconds + count * copy
        stall += wait
        reached = [*reached[1:], now + wait + compute_seconds_per_layer]
    compute = compute_seconds_per_layer * misses.shape[1]
    return TimeEstimate(stall / tokens + compute, stall / tokens, compute)


def _rate(hits: int, accesses: int) -> float | None:
    return float(hits) / float(accesses) if accesses else None


def _ask(trace: Trace, hook: PriorsHook) -> Callable[[int, int], Array | None]:
    guarded = GuardedHook(hook, num_layers=trace.num_layers, num_experts=trace.num_experts)

    def ask(first: int, end: int) -> Array | None:
        new = first == 0 or trace.sequence[first] != trace.sequence[first - 1]
        return guarded(trace.experts[first:end], bool(new))

    return ask


def _decode_passes(trace: Trace) -> Array:
    """bool, per pass: an unbroken run of prefill tokens of a sequence is one."""
    phase = trace.phase
    joined = (
        (phase[1:] == PREFILL)
        & (phase[:-1] == PREFILL)
        & (trace.sequence[1:] == trace.sequence[:-1])
    )
    return phase[np.concatenate([[True], ~joined])] == DECODE
