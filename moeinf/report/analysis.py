"""The numbers that a report shows about a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeinf.traces.eam import activation_matrix
from moeinf.traces.simulator import SimulationResult, policy_names, simulate
from moeinf.traces.trace import DECODE, PREFILL, Trace

Array = npt.NDArray[Any]

SHARES = (2, 5, 10, 15, 20, 30, 40, 50, 70)
"""Budgets in percent of all experts."""
LAYER_SHARE = 10
"""The budget of the picture per layer."""
_PREDICTED_TOKENS = 1500


@dataclass(frozen=True)
class Analysis:
    """Everything the figures of one trace need."""

    trace: Trace
    shares: tuple[int, ...]
    results: dict[str, list[SimulationResult]]  # by policy, then by share
    heat: Array  # float64 [layers, num_experts], share of a layer's routes
    reuse: Array  # int64, tokens between two uses of an expert, over all
    overlap: Array  # float64 [layers], share of a token's experts that the token before used
    predictors: dict[str, tuple[float, float]]  # (recall, precision)


def analyse(
    trace: Trace,
    *,
    policies: Sequence[str] | None = None,
    shares: Sequence[int] = SHARES,
    progress: Callable[[str], None] = lambda done: None,
) -> Analysis:
    """Simulates every policy at every budget and measures properties of the routing."""
    kept = tuple(s for s in shares if round(trace.total_experts * s / 100) >= 1)
    results: dict[str, list[SimulationResult]] = {}
    for policy in policies or policy_names():
        progress(f"{trace.name}: {policy}")
        results[policy] = [simulate(trace, policy=policy, slots=f"{share}%") for share in kept]
    heat = (activation_matrix(trace, PREFILL) + activation_matrix(trace, DECODE)).astype(float)
    progress(f"{trace.name}: routing")
    return Analysis(
        trace=trace,
        shares=kept,
        results=results,
        heat=heat / np.maximum(heat.sum(1, keepdims=True), 1),
        reuse=reuse_distances(trace),
        overlap=adjacent_overlap(trace),
        predictors=predictor_quality(trace),
    )


def reuse_distances(trace: Trace) -> Array:
    """Tokens between two uses of an expert, for every reuse, in any order."""
    parts = []
    tokens = np.repeat(np.arange(trace.num_tokens), trace.top_k)
    for layer in range(trace.num_layers):
        experts = trace.experts[:, layer].ravel()
        used = experts >= 0
        keys = np.sort(experts[used].astype(np.int64) * trace.num_tokens + tokens[used])
        same = keys[1:] // trace.num_tokens == keys[:-1] // trace.num_tokens
        parts.append(np.diff(keys)[same])
    return np.concatenate(parts)


def adjacent_overlap(trace: Trace) -> Array:
    """float64 [layers]: the share of a token's experts that the previous token used too."""
    same_sequence = trace.sequence[1:] == trace.sequence[:-1]
    now, before = trace.experts[1:][same_sequence], trace.experts[:-1][same_sequence]
    matches = (now[..., :, None] == before[..., None, :]) & (now >= 0)[..., None]
    return matches.any(-1).sum((0, 2)) / np.maximum((now >= 0).sum((0, 2)), 1)


def predictor_quality(trace: Trace) -> dict[str, tuple[float, float]]:
    """Recall and precision of simple predictions of a token's experts, layer by layer.

    Each predictor names k experts from earlier routing. "previous": the experts of the previous
    token at the same layer. "most used": the most used so far. "transition": those that followed
    most often after the experts of the layer below. Measured over the first decode tokens.
    """
    decode = trace.experts[trace.phase == DECODE][:_PREDICTED_TOKENS]
    layers, width = trace.num_layers, trace.num_experts
    counts = np.zeros((layers, width))
    follows = np.zeros((layers, width, width))  # [layer, expert below, expert]
    found = {"previous": [0, 0], "most used": [0, 0], "transition": [0, 0]}
    actual_total = 0
    previous: list[Array] = []
    for token in decode:
        routed = [experts[experts >= 0] for experts in token]
        for layer, actual in enumerate(routed):
            k = len(actual)
            actual_total += k
            guesses = {
                "previous": previous[layer] if previous else actual[:0],
                "most used": np.argsort(-counts[layer], kind="stable")[:k],
                "transition": np.argsort(-follows[layer, routed[layer - 1]].sum(0), kind="stable")[
                    :k
                ]
                if layer
                else actual[:0],
            }
            for name, guess in guesses.items():
                found[name][0] += int(np.isin(guess, actual).sum())
                found[name][1] += len(guess)
        for layer, actual in enumerate(routed):
            counts[layer, actual] += 1
            if layer:
                follows[layer, routed[layer - 1][:, None], actual[None, :]] += 1
        previous = routed
    return {
        name: (right / max(actual_total, 1), right / max(guessed, 1))
        for name, (right, guessed) in found.items()
    }
