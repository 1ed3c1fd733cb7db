"""One sentence about each picture, with the numbers of its trace."""

from __future__ import annotations

import numpy as np

from moeinf.report.analysis import LAYER_SHARE, Analysis
from moeinf.traces.simulator import SimulationResult

OURS = "learned"
OPTIMUM = "belady"


def rate_of(result: SimulationResult) -> float:
    """Decode hit rate, or the hit rate of all steps if a trace has no decode tokens."""
    rate = result.hit_rate_decode
    return float(rate if rate is not None else result.hit_rate_all or 0.0)


def near_layer_share(analysis: Analysis) -> int:
    """The simulated budget nearest to the budget of the picture by layer."""
    return min(range(len(analysis.shares)), key=lambda i: abs(analysis.shares[i] - LAYER_SHARE))


def shown_policy(analysis: Analysis) -> str:
    return OURS if OURS in analysis.results else next(iter(analysis.results))


def layer_rate(result: SimulationResult) -> np.ndarray:
    """float64 [layers]: hit rate over prompts and decode tokens."""
    hits = result.decode_hits + result.prefill_hits
    accesses = result.decode_accesses + result.prefill_accesses
    rates: np.ndarray = hits / np.maximum(accesses, 1)
    return rates


def hit_rates(analysis: Analysis) -> str:
    at, policy = near_layer_share(analysis), shown_policy(analysis)
    text = (
        f"With {analysis.shares[at]}% of the experts in slots {policy} finds "
        f"{rate_of(analysis.results[policy][at]):.0%} there"
    )
    others = [p for p in ("eam", "lru") if p in analysis.results and p != policy]
    parts = [f"{p} {rate_of(analysis.results[p][at]):.0%}" for p in others]
    if OPTIMUM in analysis.results:
        parts.append(f"Belady's optimum {rate_of(analysis.results[OPTIMUM][at]):.0%}")
    return text + "".join(f", {part}" for part in parts)


def layer_rates(analysis: Analysis) -> str:
    at, policy = near_layer_share(analysis), shown_policy(analysis)
    rates = layer_rate(analysis.results[policy][at])
    return (
        f"{policy} finds least in layer {rates.argmin()} ({rates.min():.0%}) and most in layer "
        f"{rates.argmax()} ({rates.max():.0%})"
    )


def heat_map(analysis: Analysis) -> str:
    layer, expert = np.unravel_index(analysis.heat.argmax(), analysis.heat.shape)
    unused = float((analysis.heat == 0).mean())
    return (
        f"The busiest is expert {expert} of layer {layer}: {analysis.heat.max():.0%} of its "
        "layer's routes; "
        + (f"{unused:.1%} of all experts are never used" if unused else "every expert is used")
    )


def sorted_heat_map(analysis: Analysis) -> str:
    ordered = np.sort(analysis.heat, axis=1)[:, ::-1].cumsum(1)
    half = int(np.median((ordered < 0.5).sum(1) + 1))
    return f"{half} of {analysis.heat.shape[1]} experts take half of a layer's routes"


def reuse_distance(analysis: Analysis) -> str:
    if not analysis.reuse.size:
        return "No expert is used twice"
    soon, later = (float((analysis.reuse <= n).mean()) for n in (1, 8))
    return f"{soon:.0%} of the reuses come with the next token, {later:.0%} within 8"


def overlap(analysis: Analysis) -> str:
    return f"A token shares {analysis.overlap.mean():.0%} of its experts with the one before"


def predictors(analysis: Analysis) -> str:
    name = max(analysis.predictors, key=lambda n: analysis.predictors[n][0])
    recall, precision = analysis.predictors[name]
    return f"'{name}' names most: {recall:.0%} of the experts used, {precision:.0%} of it right"
