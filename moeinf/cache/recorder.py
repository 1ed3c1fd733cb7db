"""Records the routing of a live cache as a trace."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch

from moeinf.cache.observers import Array, Pass, PassObserver
from moeinf.traces.trace import DECODE, PREFILL, Trace

if TYPE_CHECKING:
    from moeinf.cache.cache import ExpertCache


class Recorder(PassObserver):
    """Keeps what the router said of every token; made by `ExpertCache.record`.

    A context manager: recording ends with it. Costs one small copy per layer and pass, a few us;
    with the probabilities of all experts, one more and their computation.
    """

    def __init__(self, cache: ExpertCache, *, router: bool = False):
        super().__init__(cache.store.num_layers)
        self._cache = cache
        self._router = _RouterRows(cache.store.num_layers) if router else None
        self._routers: list[Array] = []  # one per part, where recorded
        self._parts: list[tuple[Array, ...]] = []
        self._sequences = 0  # numbers given so far

    def add_router(self, layer: int, probabilities: torch.Tensor) -> None:
        """What the router of MoE layer `layer` gives each expert, before that layer's
        `fused_experts`; [T, num_experts], floating point, on any device.

        Raises ValueError for another shape or dtype, or without `record(router=True)`.
        """
        if self._router is None:
            raise ValueError("this recorder keeps no router probabilities: record(router=True)")
        width = self._cache.store.num_experts
        if (
            probabilities.ndim != 2
            or probabilities.shape[1] != width
            or not probabilities.is_floating_point()
        ):
            raise ValueError(
                f"router probabilities: expected floating point [T, {width}], found "
                f"{probabilities.dtype} {list(probabilities.shape)}"
            )
        self._router.given = (layer, probabilities)

    def add(self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
        super().add(layer, topk_ids, topk_weights)
        if self._router is not None:
            self._router.take(layer, topk_ids.shape[0])

    def trace(self, *, model: str = "", source: str = "") -> Trace:
        """Everything recorded so far, sequence after sequence.

        Raises:
            ValueError: no complete forward pass was recorded, or router probabilities were to be
                and have not been handed in for every layer.
        """
        self.finish_pass()
        if not self._parts:
            raise ValueError("nothing was recorded: no forward pass has gone through the cache")
        experts, weights, sequence, phase = (
            np.concatenate(arrays) for arrays in zip(*self._parts, strict=True)
        )
        order = np.argsort(sequence, kind="stable")  # a batch advances its sequences in turn
        return Trace(
            experts=experts[order],
            weights=weights[order],
            router=None if self._router is None else self._all_router()[order],
            sequence=sequence[order],
            phase=phase[order],
            num_experts=self._cache.store.num_experts,
            model=model,
            source=source,
        )

    def on_pass(self, one: Pass) -> None:
        if one.new_sequence or self._sequences == 0:
            self._sequences += one.batch
        tokens = len(one.experts)
        first = self._sequences - one.batch
        sequence = np.repeat(np.arange(one.batch, dtype=np.int32) + first, tokens // one.batch)
        phase = np.full(tokens, PREFILL if one.prefill else DECODE, dtype=np.uint8)
        self._parts.append((one.experts, one.weights, sequence.astype(np.int32), phase))
        if self._router is not None and (rows := self._router.of_pass(tokens)) is not None:
            self._routers.append(rows)

    def _all_router(self) -> Array:
        if len(self._routers) != len(self._parts):
            raise ValueError(
                f"router probabilities: expected for every layer of {len(self._parts)} passes, "
                f"found for {len(self._routers)}: hand them to add_router before fused_experts"
            )
        return np.concatenate(self._routers)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cache.stop_recording()


class _RouterRows:
    """Router probabilities of the pass in progress: float16 [layers, T, num_experts].

    They stay on their device until the pass is over: one copy, not one per layer.
    """

    def __init__(self, num_layers: int):
        self.given: tuple[int, torch.Tensor] | None = None  # for the layer that comes next
        self._rows = torch.empty(num_layers, 0, 0, dtype=torch.float16)
        self._by_layer = list(self._rows)
        self._next = 0  # layers before it have theirs

    def take(self, layer: int, tokens: int) -> None:
        """The layer's routing has been recorded; what was given belongs to it."""
        given, self.given = self.given, None
        if given is None or given[0] != layer:
            return
        probabilities = given[1]
        if probabilities.shape[0] != tokens:
            raise ValueError(
                f"router probabilities of layer {layer}: expected {tokens} rows, found "
                f"{probabilities.shape[0]}"
            )
        row = self._by_layer[layer]
        if row.shape != probabilities.shape or row.device != probabilities.device:
            shape = (len(self._rows), *probabilities.shape)
            self._rows = torch.empty(shape, dtype=torch.float16, device=probabilities.device)
            self._by_layer = list(self._rows)
            row = self._by_layer[layer]
        row.copy_(probabilities)
        self._next = layer + 1 if layer in (0, self._next) else 0

    def of_pass(self, tokens: int) -> Array | None:
        """float16 [tokens, layers, num_experts], or None where a layer lacks its own."""
        complete = self._next == len(self._rows) and self._rows.shape[1] == tokens
        self._next = 0
        return self._rows.cpu().numpy().swapaxes(0, 1).copy() if complete else None
