"""Sums and ratios over the counters of the core."""

from __future__ import annotations

from typing import Any

COUNTERS = (
    "accesses",
    "hits",
    "misses",
    "evictions",
    "demand_bytes",
    "prefetch_bytes",
    "prefetch_useful_bytes",
    "prefetch_wasted_bytes",
    "stall_seconds",
)


def with_totals(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The counters of all layers summed, and `layers` themselves, each with its hit rate."""
    total: dict[str, Any] = {name: sum(layer[name] for layer in layers) for name in COUNTERS}
    for counters in (total, *layers):
        accesses = counters["accesses"]
        counters["hit_rate"] = counters["hits"] / accesses if accesses else 0.0
    return {**total, "layers": layers}


def prediction_summary(counts: dict[str, Any]) -> dict[str, Any]:
    """The cache's counts of predictions, with the ratios that people ask for.

    recall: share of the experts used that had been predicted; precision: share of those predicted
    that were used; precision_among_misses: the same for those that were not resident when they were
    predicted, which are all that a prefetch can win; active_share: of the predicted steps, those in
    passes that did read ahead. None where nothing was counted. `late` prefetches were still being
    read when their step came, and took `late_seconds` more. `gain` is the share of a pass's time
    that reading ahead saves, from passes with and without it in turn, give or take `gain_error`;
    prefetching is on where it is clearly above zero (`state`: "off", "on trial" or "on").
    """

    def ratio(part: str, whole: str) -> float | None:
        return counts[part] / counts[whole] if counts[whole] else None

    return {
        **counts,
        "recall": ratio("correct", "used"),
        "precision": ratio("correct", "predicted"),
        "precision_among_misses": ratio("predicted_absent_used", "predicted_absent"),
        "active_share": ratio("active_steps", "steps"),
    }
