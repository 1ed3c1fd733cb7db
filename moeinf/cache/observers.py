"""Collects the routing of a live cache, one forward pass at a time.

`fused_experts` sees one layer at a time, but traces and priors hooks need whole passes. The layers
of several callers may come in any order, so the passes of each caller are collected apart.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from moeinf.cache.passes import ForwardPass

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RoutedPass:
    """The routing of one forward pass.

    experts int16 [tokens, layers, k], -1: none; weights float32, likewise.
    """

    experts: Array
    weights: Array
    info: ForwardPass
    caller: int


class PassObserver:
    """Collects layers and hands each complete pass to `on_pass` before its caller's next one."""

    def __init__(self, num_layers: int, num_experts: int):
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._collected: dict[int, _Layers] = {}  # by caller
        self._lock = threading.Lock()  # one on_pass at a time

    def on_pass(self, one: RoutedPass) -> None:
        """What a subclass does with a pass."""

    def begin_pass(self, one: ForwardPass, caller: int = 0) -> None:
        """The caller begins a pass; one of its own that an error cut short is dropped."""
        layers = self._of(caller)
        self._finish(layers, caller)
        layers.seen = 0
        layers.info = one

    def add(
        self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor, caller: int = 0
    ) -> None:
        """The routing of one MoE layer, both [T, k], layers in order; the ids on the host."""
        layers = self._of(caller)
        shape = topk_ids.shape
        # A runtime that does not announce its passes.
        if layer != layers.seen or (layer != 0 and shape != layers.shape):
            several = shape[0] > 1
            self.begin_pass(ForwardPass(prefill=several, new_sequence=several), caller)
            if layer != 0:  # the rest of a pass whose beginning was not seen
                return
        if layer == 0:
            layers.info.check_tokens(shape[0])
        if shape != layers.shape:
            layers.make_room(shape, topk_weights.device)
        experts, weights = layers.rows[layer]
        experts.copy_(topk_ids)
        weights.copy_(topk_weights)
        layers.seen = layer + 1

    def finish_passes(self) -> None:
        """Hands over every pass that is complete, whoever runs it."""
        for caller, layers in list(self._collected.items()):
            self._finish(layers, caller)

    def _of(self, caller: int) -> _Layers:
        layers = self._collected.get(caller)
        if layers is None:
            layers = self._collected[caller] = _Layers(self._num_layers)
        return layers

    def _finish(self, layers: _Layers, caller: int) -> None:
        if layers.seen != self._num_layers:
            return
        with self._lock:
            if layers.seen != self._num_layers:
                return  # another thread has asked for it meanwhile
            layers.seen = 0
            experts, weights = (
                rows.cpu().numpy().swapaxes(0, 1).copy()
                for rows in (layers.experts, layers.weights)
            )
            experts[experts == self._num_experts] = -1  # the other id that means "no expert"
            self.on_pass(RoutedPass(experts, weights, layers.info, caller))


class _Layers:
    """The layers so far of the pass that one caller is in."""

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self.seen = 0
        self.info = ForwardPass(prefill=True, new_sequence=True)
        self.make_room(torch.Size((0, 0)), torch.device("cpu"))

    def make_room(self, shape: torch.Size, device: torch.device) -> None:
        """Room for passes of the shape [T, k]: [layers, T, k], and views by layer.

        Weights stay on their device until the pass is over: one copy, not one per layer.
        """
        self.shape = shape
        self.experts = torch.empty(self.num_layers, *shape, dtype=torch.int16)
        self.weights = torch.empty(self.num_layers, *shape, device=device)
        self.rows = list(zip(self.experts, self.weights, strict=True))
