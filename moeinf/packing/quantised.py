"""One expert in another format: its tensors, and what the rounding does to its outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moeinf.checkpoint.formats import MULTIPLIER
from moeinf.checkpoint.layout import Layout
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import CheckpointError, UnsupportedError
from moeinf.kernels.forms import Gate
from moeinf.kernels.gates import reference
from moeinf.packing.shards import Part, Spec
from moeinf.packing.targets import SHAPE, Pieces, Target

TOKENS = 16  # random ones, with elements of size 1, on which the error is judged
JUDGED = 4  # experts of each layer
# What most families call the matrices. Without a gate, the only matrix before the activation is up.
WORDS = {True: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
         False: {"gate": "up_proj", "down": "down_proj"}}  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """Sums of squares over the outputs of an expert: of the changes, and of what they were."""

    change: float = 0.0
    size: float = 0.0

    def __add__(self, other: Judged) -> Judged:
        return Judged(self.change + other.change, self.size + other.size)

    @property
    def error(self) -> float:
        return float((self.change / self.size) ** 0.5) if self.size else 0.0


@dataclass(frozen=True)
class StoredExpert(Part, ABC):
    """An expert of a store, to be written in another format.

    bases: matrix -> its name in the pack, without what stands behind it for each piece.
    """

    store: ExpertStore
    layer: int
    expert: int
    bases: Mapping[str, str]

    @property
    def module(self) -> str:
        return self.store.modules[self.layer]

    @abstractmethod
    def make(self) -> tuple[dict[str, torch.Tensor], Judged | None]:
        """The tensors by name, and the error where it is judged."""


@dataclass(frozen=True)
class QuantisedExpert(StoredExpert):
    """As `target`."""

    target: Target

    @property
    def specs(self) -> Sequence[Spec]:  # type: ignore[override]
        """In slot order: the values of gate and up, then their scales, then those of down."""
        found = []
        for group in (("gate", "up"), ("down",)):
            for piece, end in self.target.names.items():
                for name in group:
                    if name in self.bases and piece != MULTIPLIER:
                        kind = self._specs[name][piece]
                        found.append(Spec.of(self.bases[name] + end, *kind))
        return found

    @property
    def small(self) -> Sequence[Spec]:  # type: ignore[override]
        found = []
        for name, base in self.bases.items():
            if self.target.words is not None:
                found.append(Spec.of(base + SHAPE, torch.int64, (2,)))
            if MULTIPLIER in self.target.names:
                kind = self._specs[name][MULTIPLIER]
                found.append(Spec.of(base + self.target.names[MULTIPLIER], *kind))
        return found

    @property
    def _specs(self) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
        """Matrix -> piece -> dtype and shape."""
        matrices = self.store.layout.named
        return {name: self.target.specs(one.rows, one.cols) for name, one in matrices.items()}

    def make(self) -> tuple[dict[str, torch.Tensor], Judged | None]:
        """The tensors by name, and the error where this is one of the experts that are judged.

        Raises:
            CheckpointError: a weight that is no finite number.
        """
        weights = {}
        for name, part in stored_weights(self.store, self.layer, self.expert).items():
            weights[name] = part.float()
            if not weights[name].isfinite().all():
                raise CheckpointError(
                    f"{self.module}, expert {self.expert}, {name}: expected finite numbers"
                )
        pieces: dict[str, Pieces] = {}
        for group in (("gate", "up"), ("down",)):
            names = [name for name in group if name in weights]
            made = self.target.quantise(self.target.row, [weights[name] for name in names])
            pieces |= dict(zip(names, made, strict=True))
        tensors: dict[str, torch.Tensor] = {}
        for name, base in self.bases.items():
            stored = self.target.stored(pieces[name])
            tensors |= {base + end: stored[piece] for piece, end in self.target.names.items()}
            if self.target.words is not None:
                tensors[base + SHAPE] = torch.tensor(weights[name].shape)
        step = max(1, self.store.num_experts // JUDGED)
        return tensors, None if self.expert % step else self._judge(weights, pieces)

    def _judge(self, weights: dict[str, torch.Tensor], pieces: dict[str, Pieces]) -> Judged:
        draw = torch.Generator().manual_seed(self.layer * self.store.num_experts + self.expert)
        x = torch.randn(TOKENS, self.store.layout.hidden, generator=draw)
        decoded = {name: self.target.row.dequantise(one).float() for name, one in pieces.items()}
        before, after = (_ffn(x, one, self.store.form.gate) for one in (weights, decoded))
        return Judged(
            float((after - before).double().square().sum()), float(before.double().square().sum())
        )


def _ffn(x: torch.Tensor, weights: dict[str, torch.Tensor], gate: Gate) -> torch.Tensor:
    up = F.linear(x, weights["up"]) if "up" in weights else None
    return F.linear(reference(gate, F.linear(x, weights["gate"]), up), weights["down"])


def quantised(store: ExpertStore, target: Target) -> list[QuantisedExpert]:
    """Every expert of a store, each matrix under a name of its own.

    Tensors of all experts are taken apart, into the names that most families have.

    Raises:
        UnsupportedError: experts that the target cannot hold.
    """
    target = _fitting(store, target)
    return [
        QuantisedExpert(store, layer, expert, bases, target)
        for layer, expert, bases in experts_of(store)
    ]


def experts_of(store: ExpertStore) -> Iterator[tuple[int, int, dict[str, str]]]:
    """Layer, number and bases of every expert: see StoredExpert."""
    for layer in range(store.num_layers):
        for expert in range(store.num_experts):
            yield layer, expert, bases_of(store, layer, expert)


def bases_of(store: ExpertStore, layer: int, expert: int) -> dict[str, str]:
    """Matrix -> its name in the pack, without what stands behind it for each piece."""
    words, bases = WORDS[store.form.has_gate], dict[str, str]()
    for (matrix, _), part in store.slices(layer, expert).items():
        name = part.entry.name.removesuffix(".weight")
        for one in ("gate", "up") if matrix == "gate_up" else (matrix,):
            bases[one] = name
            if matrix == "gate_up" or part.nbytes != part.entry.nbytes:
                bases[one] = f"{name.rpartition('.')[0]}.{expert}.{words[one]}"
    return {one: bases[one] for one in words}


def stored_weights(store: ExpertStore, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """The stored values of each matrix of an expert, as they are in a slot."""
    segments = store.read(layer, expert)
    found = {}
    for name, matrix in store.layout.named.items():
        rows = matrix.values
        found[name] = segments[rows.segment.name][rows.first :: rows.step][: rows.count]
    return found


def refuse_biases(store: ExpertStore) -> None:
    if store.form.has_bias:
        raise UnsupportedError(
            f"{store.modules[0]}: experts with biases are not quantised: they lie in tensors of "
            "all experts, and no other names are known for them"
        )


def quantised_layout(store: ExpertStore, target: Target) -> Layout:
    """How an expert of the store would lie in a slot, as `target`. Raises UnsupportedError."""
    layout = store.layout
    row = _fitting(store, target).row
    return Layout.of(store.form, row, layout.hidden, layout.intermediate)


def _fitting(store: ExpertStore, target: Target) -> Target:
    """The target for experts of these sizes."""
    refuse_biases(store)
    try:
        return target.for_sizes((store.layout.hidden, store.layout.intermediate))
    except ValueError as error:
        raise UnsupportedError(f"{store.modules[0]}: {target.row.name}: {error}") from error
