"""Puts the routing of a live cache together again, one forward pass at a time.

`fused_experts` sees one layer at a time; traces and priors hooks want whole passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Pass:
    """One forward pass over `batch` sequences of equal length, rows in order of sequences.

    experts int16 [tokens, layers, k], -1: none; weights float32, likewise.
    """

    experts: Array
    weights: Array
    batch: int
    prefill: bool
    new_sequence: bool


class PassObserver:
    """Collects layers and hands each complete pass to `on_pass` before the next one begins."""

    def __init__(self, num_layers: int):
        self._num_layers = num_layers
        self._seen = 0  # layers of the pass so far
        self._make_room(torch.Size((0, 0)), torch.device("cpu"))
        self._batch = 1
        self._prefill = True
        self._new_sequence = True

    def on_pass(self, one: Pass) -> None:
        """What a subclass does with a pass."""

    def begin_pass(self, *, prefill: bool, new_sequence: bool, batch: int) -> None:
        """A forward pass over `batch` sequences of equal length begins."""
        self.finish_pass()
        self._prefill, self._new_sequence, self._batch = prefill, new_sequence, batch

    def add(self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """The routing of one MoE layer, both [T, k], layers in order; the ids on the host."""
        shape = topk_ids.shape
        # A runtime that does not announce its passes.
        if layer != self._seen or (layer != 0 and shape != self._shape):
            several = shape[0] > 1
            self.begin_pass(prefill=several, new_sequence=several, batch=1)
            if layer != 0:  # the rest of a pass whose beginning was not seen
                return
        if shape != self._shape:
            self._make_room(shape, topk_weights.device)
        experts, weights = self._rows[layer]
        experts.copy_(topk_ids)
        weights.copy_(topk_weights)
        self._seen = layer + 1

    def finish_pass(self) -> None:
        """The pass so far is over; one that an error cut short is dropped."""
        seen, self._seen = self._seen, 0
        if seen == self._num_layers:
            experts, weights = (
                rows.cpu().numpy().swapaxes(0, 1).copy() for rows in (self._experts, self._weights)
            )
            self.on_pass(Pass(experts, weights, self._batch, self._prefill, self._new_sequence))

    def _make_room(self, shape: torch.Size, device: torch.device) -> None:
        """Where passes of the shape [T, k] are collected: [layers, T, k], and views by layer.

        Weights stay on their device until the pass is over: one copy, not one per layer.
        """
        self._shape = shape
        self._experts = torch.empty(self._num_layers, *shape, dtype=torch.int16)
        self._weights = torch.empty(self._num_layers, *shape, device=device)
        self._rows = list(zip(self._experts, self._weights, strict=True))
