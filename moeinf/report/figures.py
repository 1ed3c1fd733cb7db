"""Draws what `analysis` computed. Sized so that labels stay readable on a phone's width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moeinf.errors import UnsupportedError
from moeinf.report.analysis import LAYER_SHARE, Analysis
from moeinf.simulator import SimulationResult

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
except ImportError as error:
    raise UnsupportedError("pictures need matplotlib: pip install 'moeinf[report]'") from error

# Okabe and Ito's colours, told apart by nearly everyone; belady is the line above all.
STYLES: dict[str, dict[str, Any]] = {
    "lru": {"color": "#56B4E9", "marker": "o"},
    "lfu": {"color": "#009E73", "marker": "s"},
    "lrfu": {"color": "#E69F00", "marker": "^"},
    "classlru": {"color": "#CC79A7", "marker": "v"},
    "eam": {"color": "#0072B2", "marker": "*", "markersize": 11, "linewidth": 2},
    "best": {"color": "#D55E00", "marker": "D", "linewidth": 2.5},
    "belady": {"color": "black", "linestyle": "--", "linewidth": 2},
}
LABELS = {"eam": "eam (MoE-Infinity)", "belady": "belady (needs the future)"}


def new_figure(height: float = 3.9) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, height), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25)
    return figure, axes


def rate_of(result: SimulationResult) -> float:
    rate = result.hit_rate_decode
    return float(rate if rate is not None else result.hit_rate_all or 0.0)


def draw_hit_rates(results: dict[str, list[SimulationResult]], total_experts: int) -> Figure:
    """Hit rate against budget, one line per policy."""
    figure, axes = new_figure(4.6)
    for policy, of_policy in results.items():
        points = sorted((r.slots / total_experts, rate_of(r)) for r in of_policy)
        style = {"markersize": 5, **STYLES.get(policy, {})}
        axes.plot(*zip(*points, strict=True), label=LABELS.get(policy, policy), **style)
    axes.set_xlabel("slots, share of all experts")
    axes.set_ylabel("hit rate")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(0, 1.02)
    figure.legend(loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    return figure


def hit_rates(analysis: Analysis) -> Figure:
    return draw_hit_rates(analysis.results, analysis.trace.total_experts)


def heat_map(analysis: Analysis) -> Figure:
    figure, axes = new_figure()
    axes.grid(False)
    # Experts in order of use within each layer: what matters is how uneven a layer is.
    image = axes.imshow(
        np.sort(analysis.heat, axis=1)[:, ::-1],
        aspect="auto",
        cmap="magma",
        interpolation="nearest",
    )
    axes.set_xlabel("expert, most used first")
    axes.set_ylabel("layer")
    figure.colorbar(image, format=PercentFormatter(1), label="share of the layer's routes")
    return figure


def heat_map_by_id(analysis: Analysis) -> Figure:
    figure, axes = new_figure()
    axes.grid(False)
    image = axes.imshow(analysis.heat, aspect="auto", cmap="magma", interpolation="nearest")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    figure.colorbar(image, format=PercentFormatter(1), label="share of the layer's routes")
    return figure


def reuse_distance(analysis: Analysis) -> Figure:
    figure, axes = new_figure()
    distances = np.maximum(analysis.reuse, 1)
    if distances.size:
        values, counts = np.unique(distances, return_counts=True)
        axes.step(values, np.cumsum(counts) / distances.size, where="post", color="#D55E00", lw=2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("tokens until an expert's next use, at most")
    axes.set_ylabel("share of reuses")
    return figure


def overlap(analysis: Analysis) -> Figure:
    figure, axes = new_figure(3.4)
    layers = np.arange(len(analysis.overlap))
    axes.bar(layers, analysis.overlap, color="#0072B2")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("layer")
    axes.set_ylabel("experts shared with\nthe token before")
    return figure


def layer_rates(analysis: Analysis) -> Figure:
    figure, axes = new_figure(4.2)
    at = min(range(len(analysis.shares)), key=lambda i: abs(analysis.shares[i] - LAYER_SHARE))
    for policy, results in analysis.results.items():
        result = results[at]
        hits = result.decode_hits + result.prefill_hits
        accesses = result.decode_accesses + result.prefill_accesses
        style = {k: v for k, v in STYLES.get(policy, {}).items() if not k.startswith("marker")}
        axes.plot(hits / np.maximum(accesses, 1), label=policy, **style)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("layer")
    axes.set_ylabel(f"hit rate with {analysis.shares[at]}% of experts in slots")
    figure.legend(loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    return figure


def predictors(analysis: Analysis) -> Figure:
    figure, axes = new_figure(3.0)
    names = list(analysis.predictors)
    rows = np.arange(len(names))
    recalls, precisions = zip(*analysis.predictors.values(), strict=True)
    axes.barh(rows - 0.2, recalls, 0.38, label="recall", color="#009E73")
    axes.barh(rows + 0.2, precisions, 0.38, label="precision", color="#E69F00")
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    return figure


# Title, what to see, and how to draw it, in the order of the page.
FIGURES: list[tuple[str, str, Callable[[Analysis], Figure]]] = [
    (
        "Hit rate against budget",
        "Share of decode accesses found in slots. Between a policy's line and Belady's lies what a "
        "better policy could still win; eam is the policy of the MoE-Infinity paper, starting with "
        "an empty collection.",
        hit_rates,
    ),
    (
        "Hit rate by layer",
        "Where in the model the misses are, prompts included.",
        layer_rates,
    ),
    (
        "Activation by expert",
        "How much of each layer's routing goes to each expert.",
        heat_map_by_id,
    ),
    (
        "Activation, experts in order of use",
        "The same with every layer sorted: the steeper, the more a small cache can hold.",
        heat_map,
    ),
    (
        "Reuse distance",
        "How soon an expert is used again. The curve's height at n tokens is what a cache that "
        "holds everything for n tokens would hit among reuses.",
        reuse_distance,
    ),
    (
        "Overlap of adjacent tokens",
        "Of a token's experts, the share that the token before it used at the same layer.",
        overlap,
    ),
    (
        "Prediction",
        "How well simple predictors name a token's experts before its layer is reached: recall is "
        "the share of experts named, precision the share of names that were right.",
        predictors,
    ),
]
