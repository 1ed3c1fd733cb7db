"""An analytic model of time: what the misses of a simulation cost on a machine of known speeds."""

from __future__ import annotations

from dataclasses import dataclass

from moeinf.traces.simulator import SimulationResult


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
