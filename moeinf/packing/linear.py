"""Linear layers outside the experts in another format, some rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moeinf.checkpoint.formats import SCALES
from moeinf.checkpoint.headers import TensorEntry
from moeinf.errors import CheckpointError
from moeinf.integrations.transformers.dense import linear_layers
from moeinf.integrations.transformers.plan import Plan
from moeinf.packing.quantised import TOKENS, Judged
from moeinf.packing.shards import Part, Spec
from moeinf.packing.targets import SHAPE, Target

MODULE = "linear layers"  # what the error of all of them is told as
PANEL = 1 << 22  # weights of a matrix that are quantised at a time
LEAST_ROWS = 64  # gates of shared experts and the like are too small to matter
FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class QuantisedLinear(Part):
    """The weight [rows, cols] of a linear layer, to be written as `target`."""

    entry: TensorEntry
    target: Target

    @property
    def base(self) -> str:
        return self.entry.name.removesuffix(".weight")

    @property
    def specs(self) -> Sequence[Spec]:  # type: ignore[override]
        kinds = self.target.specs(*self.entry.shape)
        names = self.target.names
        return [Spec.of(self.base + end, *kinds[piece]) for piece, end in names.items()]

    @property
    def small(self) -> Sequence[Spec]:  # type: ignore[override]
        has_shape = self.target.words is not None
        return [Spec.of(self.base + SHAPE, torch.int64, (2,))] if has_shape else []

    @property
    def step(self) -> int:
        """Rows of a panel: whole blocks of scales."""
        high = self.target.row.block[0] if self.target.row.block else 1
        return max(1, PANEL // self.entry.shape[1] // high) * high

    @property
    def panel_bytes(self) -> int:
        """The most that a panel takes, as it is stored here or there."""
        return self.step * self.entry.nbytes // self.entry.shape[0]

    def make(
        self, first: int, raw: torch.Tensor
    ) -> tuple[dict[str, tuple[int, torch.Tensor]], Judged]:
        """Rows from `first` on of their bytes: by tensor, the byte at which they begin and what
        they have become.

        Raises:
            CheckpointError: a weight that is no finite number.
        """
        weights = raw.view(self.entry.torch_dtype()).view(-1, self.entry.shape[1]).float()
        if not weights.isfinite().all():
            raise CheckpointError(f"{self.entry.path}: {self.entry}: expected finite numbers")
        [pieces] = self.target.quantise(self.target.row, [weights])
        stored = self.target.stored(pieces)
        found = {}
        for piece, end in self.target.names.items():
            part = stored[piece]
            high = self.target.row.block[0] if piece == SCALES and self.target.row.block else 1
            row_bytes = part[0].numel() * part.element_size()
            found[self.base + end] = first // high * row_bytes, part
        if self.target.words is not None and first == 0:
            found[self.base + SHAPE] = 0, torch.tensor(self.entry.shape)
        draw = torch.Generator().manual_seed(first)
        x = torch.randn(TOKENS, weights.shape[1], generator=draw)
        before = F.linear(x, weights).double()
        after = F.linear(x, self.target.row.dequantise(pieces).float()).double()
        change = float((after - before).square().sum())
        return found, Judged(change, float(before.square().sum()))


def quantised_linear(plan: Plan, target: Target) -> dict[str, QuantisedLinear]:
    """By path, the linear layers that the target can hold. Routers stay as they are."""
    routed = {store.num_experts for store in plan.stores}
    chosen = {
        path: entry
        for path, entry in linear_layers(plan)
        if entry.dtype in FLOATS and entry.name.endswith(".weight")
        and entry.shape[0] >= LEAST_ROWS and entry.shape[0] not in routed
        and _fits(target, entry.shape[1])
    }  # fmt: skip
    if chosen:
        target = target.for_sizes(sorted({entry.shape[1] for entry in chosen.values()}))
    return {path: QuantisedLinear(entry, target) for path, entry in chosen.items()}


def _fits(target: Target, cols: int) -> bool:
    try:
        target.for_sizes((cols,))
    except ValueError:
        return False
    return True
