"""Draws what `analysis` computed. Sized so that labels stay readable on a phone's width."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeinf.errors import UnsupportedError
from moeinf.report import findings
from moeinf.report.analysis import Analysis
from moeinf.report.findings import rate_of
from moeinf.traces.simulator import SimulationResult, policy_names

try:
    from matplotlib import rc_context, rcParams
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
except ImportError as error:
    raise UnsupportedError("pictures need matplotlib: pip install 'moeinf[report]'") from error

# Colours for a dark page. A light page uses the defaults of matplotlib.
DARK: dict[Any, Any] = {
    "figure.facecolor": "#16181c", "axes.facecolor": "#16181c", "savefig.facecolor": "#16181c",
    "text.color": "#e6e6e6", "axes.labelcolor": "#e6e6e6", "axes.edgecolor": "#b0b0b0",
    "xtick.color": "#e6e6e6", "ytick.color": "#e6e6e6", "grid.color": "#b0b0b0",
}  # fmt: skip
# Okabe and Ito's colours, which nearly everyone can distinguish. One for each policy, in the order
# of the list, then from the start again with other markers.
COLOURS = ("#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#0072B2", "#D55E00")
MARKERS = "os^v*DPXp"
# belady, in the colour of the text, is the line above all.
EMPHASIS: dict[str, dict[str, Any]] = {
    "eam": {"markersize": 11, "linewidth": 2},
    "learned": {"linewidth": 2.5},
    "belady": {"color": None, "marker": None, "linestyle": "--", "linewidth": 2},
}
LABELS = {"eam": "eam (MoE-Infinity)", "belady": "belady (needs the future)"}


def style_of(policy: str) -> dict[str, Any]:
    known = policy_names()
    place = known.index(policy) if policy in known else len(known)
    style = {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        **EMPHASIS.get(policy, {}),
    }
    return {**style, "color": style["color"] or rcParams["text.color"]}


def new_figure(height: float = 3.3) -> tuple[Figure, Axes]:
    """A figure so wide that text of 10 points has about 12 pixels on a phone."""
    figure = Figure(figsize=(4.2, height), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25)
    return figure, axes


def draw_hit_rates(results: dict[str, list[SimulationResult]], total_experts: int) -> Figure:
    """Hit rate against budget, one line per policy."""
    figure, axes = new_figure(4.0)
    for policy, of_policy in results.items():
        points = sorted((r.slots / total_experts, rate_of(r)) for r in of_policy)
        style = {"markersize": 5, **style_of(policy)}
        axes.plot(*zip(*points, strict=True), label=LABELS.get(policy, policy), **style)
    axes.set_xlabel("slots, share of all experts")
    axes.set_ylabel("hit rate")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(0, 1.02)
    # Two columns: long names do not fit into three.
    figure.legend(loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    return figure


def hit_rates(analysis: Analysis) -> Figure:
    return draw_hit_rates(analysis.results, analysis.trace.total_experts)


def heat_map(analysis: Analysis) -> Figure:
    figure, axes = new_figure()
    axes.grid(False)
    # Experts sorted by use within each layer, because the figure shows how uneven a layer is.
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
    figure, axes = new_figure(3.0)
    layers = np.arange(len(analysis.overlap))
    axes.bar(layers, analysis.overlap, color="#0072B2")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("layer")
    axes.set_ylabel("experts shared with\nthe token before")
    return figure


def layer_rates(analysis: Analysis) -> Figure:
    figure, axes = new_figure(4.0)
    at = findings.near_layer_share(analysis)
    for policy, results in analysis.results.items():
        style = {k: v for k, v in style_of(policy).items() if not k.startswith("marker")}
        axes.plot(findings.layer_rate(results[at]), label=policy, **style)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("layer")
    axes.set_ylabel(f"hit rate, {analysis.shares[at]}% of experts in slots")
    figure.legend(loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    return figure


def predictors(analysis: Analysis) -> Figure:
    figure, axes = new_figure(2.7)
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


@dataclass(frozen=True)
class Picture:
    """Subject, how to read it, what it says of a trace, and how to draw it."""

    title: str
    caption: str
    finding: Callable[[Analysis], str]
    draw: Callable[[Analysis], Figure]

    def render(self, analysis: Analysis, kind: str, *, dark: bool = False) -> bytes:
        """The picture as svg or png. A PNG has a title, because no page explains it."""
        buffer = io.BytesIO()
        with rc_context(DARK if dark else None):
            figure = self.draw(analysis)
            if kind == "png":
                title = textwrap.fill(f"{analysis.trace.name}: {self.finding(analysis)}", 64)
                figure.supxlabel(title, fontsize=9)  # the top may hold a legend
            # Without a date the same trace gives the same file.
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(buffer, format=kind, metadata=metadata)
        return buffer.getvalue()


# In the order of the page.
PICTURES = (
    Picture(
        "Hit rate against budget",
        "Share of decode accesses found in slots. Between a policy's line and Belady's lies what a "
        "better policy could still win; eam is the policy of the MoE-Infinity paper, starting with "
        "an empty collection.",
        findings.hit_rates,
        hit_rates,
    ),
    Picture(
        "Hit rate by layer",
        "Where in the model the misses are, prompts included.",
        findings.layer_rates,
        layer_rates,
    ),
    Picture(
        "Activation by expert",
        "How much of each layer's routing goes to each expert.",
        findings.heat_map,
        heat_map_by_id,
    ),
    Picture(
        "Activation, experts in order of use",
        "The same with every layer sorted: the steeper, the more a small cache can hold.",
        findings.sorted_heat_map,
        heat_map,
    ),
    Picture(
        "Reuse distance",
        "How soon an expert is used again. The curve's height at n tokens is what a cache that "
        "holds everything for n tokens would hit among reuses.",
        findings.reuse_distance,
        reuse_distance,
    ),
    Picture(
        "Overlap of adjacent tokens",
        "Of a token's experts, the share that the token before it used at the same layer.",
        findings.overlap,
        overlap,
    ),
    Picture(
        "Prefetching by prediction",
        "How well simple predictors name a token's experts before its layer is reached: recall is "
        "the share of experts named, precision the share of names that were right. previous names "
        "those of the token before, transition those that mostly followed on the layer below.",
        findings.predictors,
        predictors,
    ),
)
