"""Replays traces against policies and budgets, counting exactly as the live cache does, but for
long prompts: after these the live cache leaves each layer a share of the slots.

The work is done in C++ by the classes of the live cache. This module checks arguments and names the
results; time_model.py turns misses into seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moeinf import _core
from moeinf.share import share_of
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


def check_policy(policy: str) -> None:
    """Raises ValueError, naming what exists, unless `policy` is NAME or NAME:parameter=value:..."""
    name = policy.partition(":")[0]
    if name not in policy_names():
        raise ValueError(f"no policy is named {name!r}; there are: {', '.join(policy_names())}")
    if name == "belady" and policy != name:
        raise ValueError(f"policy 'belady' has no parameters, found {policy!r}")


def parse_slots(slots: int | str, total_experts: int) -> int:
    """A count, or a share of all experts such as "5%" rounded to the nearest count, half up.

    Raises ValueError for what is neither, or comes to less than one slot.
    """
    text = str(slots).strip()
    try:
        count = share_of(text, total_experts, most=1e6) if text.endswith("%") else int(text)
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

    policy       a name of policy_names(), with parameters where wanted, as in
                 "decayed_lfu:keep=0.9", or an object like SimulatedPolicy
    slots        a count, or a share of all experts like "10%"
    eamc         the collection `eam` starts from; without one it starts from nothing
    priors       a hook asked once per forward pass; the policies that use priors are told them
    progress     called now and then with (tokens done, tokens in all)
    keep_misses  also return the misses of every step, which `time_model.estimate_time` needs

    Raises ValueError for an unknown policy, fewer than one slot, or a collection of another shape
    or for another policy; TraceError for a bad trace.
    """
    if not isinstance(trace, Trace):
        trace = Trace.load(trace)
    count = parse_slots(slots, trace.total_experts)
    if isinstance(policy, str):
        check_policy(policy)
    elif eamc is not None:
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
