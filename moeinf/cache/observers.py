"""Collects the routing of a live cache, one forward pass at a time.

`fused_experts` sees one layer at a time, but traces and priors hooks need whole passes. The layers
of several callers may come in any order, so the passes of each caller are collected apart.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from moeinf.cache.passes import Array, ForwardPass, Text


@dataclass(frozen=True)
class RoutedPass:
    """The routing of one forward pass, of those of its tokens that are text.

    experts int16 [tokens, layers, k], -1: none; weights float32, likewise; is_text: bool, of every
    token of the pass.
    """

    experts: Array
    weights: Array
    text: Text
    is_text: Array
    info: ForwardPass
    caller: int


class PassObserver:
    """Collects layers and hands each complete pass to `on_pass` before its caller's next one."""

    def __init__(self, num_layers: int, num_experts: int):
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._collected: dict[int, _Layers] = {}  # by caller
        self._lock = threading.Lock()  # one on_pass at a time
        self._tokens = 0  # of all passes so far

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
        tokens = topk_ids.shape[0]
        # A runtime that does not announce its passes.
        if layer != layers.seen or (layer != 0 and tokens != layers.tokens):
            several = tokens > 1
            self.begin_pass(ForwardPass(prefill=several, new_sequence=several), caller)
            if layer != 0:  # the rest of a pass whose beginning was not seen
                return
        if layer == 0:
            layers.info.check_tokens(tokens)
        layers.add(layer, topk_ids, topk_weights.detach())

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
            text = layers.info.text(layers.tokens, self._tokens)
            self._tokens += layers.tokens
            is_text = text.positions >= 0
            self.on_pass(
                RoutedPass(
                    experts[is_text], weights[is_text], text[is_text], is_text, layers.info, caller
                )
            )


class _Layers:
    """The layers so far of the pass that one caller is in."""

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self.seen = 0
        self.info = ForwardPass(prefill=True, new_sequence=True)
        self._make_room(0, 0, torch.device("cpu"))

    def _make_room(self, tokens: int, top_k: int, device: torch.device) -> None:
        """Room for passes of so many tokens and experts: [layers, T, k], and views by layer.

        Weights stay on their device until the pass is over: one copy, not one per layer.
        """
        self.tokens, self.top_k = tokens, top_k
        shape = (self.num_layers, tokens, top_k)
        self.experts = new_room(shape, torch.int16, torch.device("cpu"))
        self.weights = new_room(shape, torch.float32, device)
        self.rows = list(zip(self.experts, self.weights, strict=True))

    def add(self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """The layers' routing in order."""
        tokens, top_k = topk_ids.shape
        if top_k > self.top_k or (layer == 0 and (tokens, top_k) != (self.tokens, self.top_k)):
            before = self.rows[:layer]
            self._make_room(tokens, top_k, topk_weights.device)
            for earlier, rows in enumerate(before):
                self._write(earlier, *rows)
        self._write(layer, topk_ids, topk_weights)
        self.seen = layer + 1

    def _write(self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """A layer that has fewer experts per token than another is filled up with "no expert"."""
        experts, weights = self.rows[layer]
        top_k = topk_ids.shape[1]
        if top_k < self.top_k:
            experts[:, top_k:] = -1
            weights[:, top_k:] = 0
            experts, weights = experts[:, :top_k], weights[:, :top_k]
        experts.copy_(topk_ids)
        weights.copy_(topk_weights)


def new_room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that can be written in every mode of autograd, whatever the mode is now."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)
