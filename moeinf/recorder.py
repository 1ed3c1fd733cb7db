"""Records the routing of a live cache as a trace."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moeinf.trace import DECODE, PREFILL, Trace

if TYPE_CHECKING:
    from moeinf.cache import ExpertCache


class Recorder:
    """Keeps what the router said of every token; made by `ExpertCache.record`.

    A context manager: recording ends with it. Costs one small copy per layer and pass.
    """

    def __init__(self, cache: ExpertCache):
        self._cache = cache
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._parts: list[tuple[np.ndarray[Any, Any], ...]] = []
        self._last_sequence = -1  # the highest number given so far
        self._first = 0  # the number of the pass's first sequence
        self._batch = 1
        self._prefill = True

    def begin_pass(self, *, prefill: bool, new_sequence: bool, batch: int) -> None:
        """A forward pass over `batch` sequences of equal length begins."""
        self._finish_pass()
        if new_sequence or self._last_sequence < 0:
            self._first = self._last_sequence + 1
            self._last_sequence += batch
        self._prefill, self._batch = prefill, batch

    def add(self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """The routing of one MoE layer, both [T, k], layers in order."""
        if layer != len(self._layers):  # a runtime that does not announce its passes
            several = topk_ids.shape[0] > 1
            self.begin_pass(prefill=several, new_sequence=several, batch=1)
        self._layers.append((topk_ids.to(torch.int16), topk_weights.float().clone()))

    def trace(self, *, model: str = "", source: str = "") -> Trace:
        """Everything recorded so far, sequence after sequence.

        Raises:
            ValueError: no complete forward pass was recorded.
        """
        self._finish_pass()
        if not self._parts:
            raise ValueError("nothing was recorded: no forward pass has gone through the cache")
        experts, weights, sequence, phase = (
            np.concatenate(arrays) for arrays in zip(*self._parts, strict=True)
        )
        order = np.argsort(sequence, kind="stable")  # a batch advances its sequences in turn
        return Trace(
            experts=experts[order],
            weights=weights[order],
            sequence=sequence[order],
            phase=phase[order],
            num_experts=self._cache.store.num_experts,
            model=model,
            source=source,
        )

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cache.stop_recording()

    def _finish_pass(self) -> None:
        layers, self._layers = self._layers, []
        if len(layers) < self._cache.store.num_layers:
            return  # cut short by an error: such a token has no complete routing
        experts, weights = (
            np.stack([layer[i].numpy() for layer in layers], axis=1) for i in range(2)
        )
        tokens = len(experts)
        numbers = np.repeat(np.arange(self._batch) + self._first, tokens // self._batch)
        phase = np.full(tokens, PREFILL if self._prefill else DECODE, dtype=np.uint8)
        self._parts.append((experts, weights, numbers.astype(np.int32), phase))
