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
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
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
        if layer != len(self._layers):  # a runtime that does not announce its passes
            several = topk_ids.shape[0] > 1
            self.begin_pass(prefill=several, new_sequence=several, batch=1)
        self._layers.append((topk_ids.to(torch.int16), topk_weights.float().clone()))

    def finish_pass(self) -> None:
        """The pass so far is over; one that an error cut short is dropped."""
        layers, self._layers = self._layers, []
        if len(layers) == self._num_layers:
            # Weights of a GPU come to the host once per pass, not once per layer.
            experts, weights = (
                torch.stack([layer[i] for layer in layers], dim=1).cpu().numpy() for i in range(2)
            )
            self.on_pass(Pass(experts, weights, self._batch, self._prefill, self._new_sequence))
