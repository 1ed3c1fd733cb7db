"""Experts of bf16 in about 12 bits, without loss: see moeinf/checkpoint/palette.py.

A pack is made in two passes. The first one counts the rare weights of every row. So the second one
knows the format of each matrix, and with it the place of every tensor, before it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moeinf.checkpoint import palette
from moeinf.checkpoint.config import BF16_PALETTE
from moeinf.checkpoint.formats import FORMATS, VALUES, WeightFormat
from moeinf.checkpoint.layout import Layout
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import UnsupportedError
from moeinf.packing.quantised import StoredExpert, experts_of, refuse_biases, stored_weights
from moeinf.packing.shards import Spec
from moeinf.packing.writer import in_threads

BF16 = FORMATS["bf16"]
ROWS = {rare: FORMATS[f"palette{rare}"] for rare in palette.RARE}
ENDS = {row: ".weight_palette" for row in ROWS.values()} | {BF16: ".weight"}
READERS = 2  # threads; torch has threads of its own

Rows = Mapping[str, WeightFormat]  # by matrix


@dataclass(frozen=True)
class PaletteExpert(StoredExpert):
    """Its matrices in `rows`."""

    rows: Rows

    @property
    def specs(self) -> Sequence[Spec]:  # type: ignore[override]
        """In slot order: gate, up, down."""
        found = []
        for name, base in self.bases.items():
            row, matrix = self.rows[name], self.store.layout.named[name]
            kind = row.segments(matrix.rows, matrix.cols)[VALUES]
            found.append(Spec.of(base + ENDS[row], *kind))
        return found

    def make(self) -> tuple[dict[str, torch.Tensor], None]:
        """The tensors by name; nothing is rounded, so there is no error to judge."""
        made = {}
        for name, weights in stored_weights(self.store, self.layer, self.expert).items():
            row, held = self.rows[name], self.store.layout.named[name].format
            if held is not BF16:
                held.refuse({VALUES: weights}, f"{self.module}, expert {self.expert}, {name}")
                weights = palette.as_bf16(palette.bits_of(weights, held.tail))
            if row is not BF16:
                rare = next(rare for rare, one in ROWS.items() if one is row)
                weights = palette.encode(weights, palette.bases(weights)[0], rare)
            made[self.bases[name] + ENDS[row]] = weights
        return made, None


def as_bf16(stores: Sequence[ExpertStore]) -> list[PaletteExpert]:
    """Every expert of stores in bf16 and in 12 bits, to be written as bf16."""
    return [
        PaletteExpert(store, layer, expert, bases, dict.fromkeys(store.layout.named, BF16))
        for store in stores
        for layer, expert, bases in experts_of(store)
    ]


def palette_experts(
    stores: Sequence[ExpertStore], progress: Callable[[int, int], None]
) -> list[PaletteExpert]:
    """Every expert of the stores, each matrix in the smallest row that holds it.

    Matrices of all layers have the same row where that is possible: layers of other formats would
    have caches of their own. A matrix stays bf16 in a layer that no row holds.

    Args:
        progress: called with (bytes read, bytes in all).

    Raises:
        UnsupportedError: experts that are not bf16, have biases, or of which no matrix is held.
    """
    total = sum(store.nbytes for store in stores)
    done = 0
    for store in stores:
        check(store)
    found = []
    for store in stores:
        most: list[dict[str, int]] = [{} for _ in range(store.num_layers)]
        each = store.layout.nbytes
        calls = [
            partial(_count, store, layer, expert)
            for layer in range(store.num_layers)
            for expert in range(store.num_experts)
        ]
        for layer, counts in in_threads(calls, READERS):
            for name, count in counts.items():
                most[layer][name] = max(most[layer].get(name, 0), count)
            done += each
            progress(done, total)
        rows = rows_of(store, most)
        found += [
            PaletteExpert(store, layer, expert, bases, rows[layer])
            for layer, expert, bases in experts_of(store)
        ]
    if all(row is BF16 for one in found for row in one.rows.values()):
        raise UnsupportedError(
            f"{stores[0].modules[0]}: {BF16_PALETTE}: no matrix becomes smaller: in each one, some "
            f"row has more than {palette.RARE[-1]} weights outside of {palette.WINDOW} exponents, "
            f"or its columns are no multiple of {palette.COLUMNS}"
        )
    return found


def check(store: ExpertStore) -> None:
    """Raises UnsupportedError for experts that are not bf16, or have biases."""
    refuse_biases(store)
    if store.layout.format_names != BF16.name:
        raise UnsupportedError(
            f"{store.modules[0]}: {BF16_PALETTE}: expected experts in bf16, whose bits are kept, "
            f"found {store.layout.format_names}"
        )


def palette_layout(store: ExpertStore) -> Layout:
    """How an expert lies in a slot where each row has few rare weights. Raises UnsupportedError."""
    check(store)
    names = {}
    for name, matrix in store.layout.named.items():
        names[name] = ROWS[palette.RARE[0]] if _fits(matrix.cols) else BF16
    every = names["gate"], names.get("up", names["gate"]), names["down"]
    return Layout.of(store.form, every, store.layout.hidden, store.layout.intermediate)


def rows_of(store: ExpertStore, most: Sequence[Mapping[str, int]]) -> list[Rows]:
    """The row of each matrix of each layer, for the rare weights of the worst row of each."""
    groups = [("gate", "up"), ("down",)]  # gate and up of one format share their segments
    found: list[dict[str, WeightFormat]] = [{} for _ in most]
    for group in groups:
        names = [name for name in group if name in store.layout.named]
        worst = [max(counts[name] for name in names) for counts in most]
        held = [count for count in worst if count <= palette.RARE[-1]]
        fits = _fits(store.layout.named[names[0]].cols)
        for layer, count in enumerate(worst):
            row = BF16
            if fits and count <= palette.RARE[-1]:
                row = ROWS[next(rare for rare in palette.RARE if rare >= max(held))]
            found[layer] |= dict.fromkeys(names, row)
    return list(found)


def _fits(cols: int) -> bool:
    return cols % palette.COLUMNS == 0 and cols <= palette.MOST_COLUMNS


def _count(store: ExpertStore, layer: int, expert: int) -> tuple[int, dict[str, int]]:
    """Of each matrix, the rare weights of its worst row."""
    weights = stored_weights(store, layer, expert)
    return layer, {name: int(palette.bases(one)[1].max()) for name, one in weights.items()}


def palette_config(rows: Sequence[PaletteExpert]) -> dict[str, Any]:
    """quantization_config. It has no quant_method: transformers refuses that. With a method that it
    does not know, it would load random experts."""
    names = sorted({row.name for one in rows for row in one.rows.values()})
    return {"format": BF16_PALETTE, "weights": names}


def summary(experts: Sequence[PaletteExpert]) -> dict[str, str]:
    """By matrix: the formats, and in how many layers of experts."""
    layers: dict[str, dict[str, set[str]]] = {}
    for one in experts:
        for name, row in one.rows.items():
            layers.setdefault(name, {}).setdefault(row.name, set()).add(one.module)
    return {
        name: ", ".join(f"{row} in {len(modules)} layers" for row, modules in found.items())
        for name, found in layers.items()
    }
