"""Records the routing of a live cache as a trace."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from moeinf.cache.observers import PassObserver, RoutedPass, new_room
from moeinf.cache.passes import Array, ForwardPass, Observer, Text
from moeinf.traces.trace import DECODE, PREFILL, Trace

# Calls the function given with (layer, probabilities [T, num_experts]) before that layer's experts
# are asked for; returns what ends it.
RouterSource = Callable[[Callable[[int, torch.Tensor], None]], Callable[[], None]]


class Recorder(PassObserver, AbstractContextManager["Recorder"]):
    """Keeps the router's choices for every token; made by `ExpertCache.record`.

    A context manager: recording ends with it, or with `stop`. Costs one small copy per layer and
    pass, a few us; with the probabilities of all experts, one more and their computation.
    """

    def __init__(self, num_layers: int, num_experts: int, *, router: bool = False):
        super().__init__(num_layers, num_experts)
        self._seen_by: list[tuple[list[Observer], Observer]] = []
        self._stop_listening: Callable[[], None] | None = None
        self._keeps_router = router
        self._given: dict[int, tuple[int, torch.Tensor]] = {}  # by thread: for the layer to come
        self._router_rows: dict[int, _RouterRows] = {}  # by caller
        self._routers: list[Array] = []  # one per part, where recorded
        self._parts: list[tuple[Array, Array]] = []  # experts, weights
        self._texts: list[Text] = []  # of each part; sequences by their number in the trace
        self._numbers: dict[int, dict[int, int]] = {}  # by caller: its sequences, as recorded
        self._sequences = 0  # numbers given so far

    def start(self, observers: Sequence[list[Observer]], routers: RouterSource | None) -> Recorder:
        """Records what the caches with these observers do; of passes it hears from the first."""
        if self._keeps_router and routers is not None:
            self._stop_listening = routers(self.add_router)
        self._seen_by = [
            (of_cache, _RoutingOnly(self) if i else self) for i, of_cache in enumerate(observers)
        ]
        for of_cache, observer in self._seen_by:
            of_cache.append(observer)
        return self

    def stop(self) -> None:
        """Ends recording; what was recorded stays."""
        for of_cache, observer in self._seen_by:
            of_cache.remove(observer)
        self._seen_by = []
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None

    def add_router(self, layer: int, probabilities: torch.Tensor) -> None:
        """What the router of MoE layer `layer` gives each expert, before that layer's
        `fused_experts`; [T, num_experts], floating point, on any device.

        Raises ValueError for another shape or dtype, or without `record(router=True)`.
        """
        if not self._keeps_router:
            raise ValueError("this recorder keeps no router probabilities: record(router=True)")
        width = self._num_experts
        if (
            probabilities.ndim != 2
            or probabilities.shape[1] != width
            or not probabilities.is_floating_point()
        ):
            raise ValueError(
                f"router probabilities: expected floating point [T, {width}], found "
                f"{probabilities.dtype} {list(probabilities.shape)}"
            )
        self._given[threading.get_ident()] = (layer, probabilities)

    def add(
        self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor, caller: int = 0
    ) -> None:
        super().add(layer, topk_ids, topk_weights, caller)
        if self._keeps_router:
            rows = self._router_rows.get(caller)
            if rows is None:
                rows = self._router_rows[caller] = _RouterRows(self._num_layers)
            rows.take(layer, topk_ids.shape[0], self._given.pop(threading.get_ident(), None))

    def trace(self, *, model: str = "", source: str = "") -> Trace:
        """Everything recorded so far, sequence after sequence.

        Raises:
            ValueError: no complete forward pass was recorded, or router probabilities were to be
                and have not been handed in for every layer.
        """
        self.finish_passes()
        if not self._parts:
            raise ValueError(
                "nothing was recorded: no forward pass has gone through the cache from the first "
                "MoE layer to the last (an encoder and its decoder run apart: neither is recorded)"
            )
        top_k = max(experts.shape[2] for experts, _ in self._parts)
        text = Text(
            np.concatenate([one.sequences for one in self._texts]),
            np.concatenate([one.positions for one in self._texts]),
            np.concatenate([one.prefill for one in self._texts]),
        )
        order = _text_order(text)
        if len(order) == 0:
            raise ValueError("nothing was recorded: no token of a forward pass was text")
        return Trace(
            experts=np.concatenate([_widened(one, top_k, -1) for one, _ in self._parts])[order],
            weights=np.concatenate([_widened(one, top_k, 0) for _, one in self._parts])[order],
            router=self._all_router()[order] if self._keeps_router else None,
            sequence=text.sequences[order],
            phase=np.where(text.prefill, PREFILL, DECODE).astype(np.uint8)[order],
            num_experts=self._num_experts,
            model=model,
            source=source,
        )

    def on_pass(self, one: RoutedPass) -> None:
        numbers = self._numbers.setdefault(one.caller, {})
        if one.info.new_sequence:
            numbers.clear()
        names = one.text.sequences.tolist()
        for name in dict.fromkeys(names):
            if name not in numbers:
                numbers[name] = self._sequences
                self._sequences += 1
        sequences = np.array([numbers[name] for name in names], dtype=np.int32)
        self._parts.append((one.experts, one.weights))
        self._texts.append(Text(sequences, one.text.positions, one.text.prefill))
        if self._keeps_router:
            rows = self._router_rows.get(one.caller)
            router = None if rows is None else rows.of_pass(len(one.is_text))
            if router is not None:
                self._routers.append(router[one.is_text])

    def _all_router(self) -> Array:
        if len(self._routers) != len(self._parts):
            raise ValueError(
                f"router probabilities: expected for every layer of {len(self._parts)} passes, "
                f"found for {len(self._routers)}: hand them to add_router before fused_experts"
            )
        return np.concatenate(self._routers)

    def __exit__(self, *error: object) -> None:
        self.stop()


class _RoutingOnly:
    """Shows a recorder the routing of one more cache."""

    def __init__(self, recorder: Recorder):
        self.add = recorder.add

    def begin_pass(self, one: ForwardPass, caller: int) -> None:
        """The recorder has heard of it."""


def _widened(rows: Array, top_k: int, value: int) -> Array:
    """[tokens, layers, k] with more columns, where k was raised while recording."""
    return np.pad(rows, ((0, 0), (0, 0), (0, top_k - rows.shape[2])), constant_values=value)


def _text_order(text: Text) -> Array:
    """Which tokens make the trace: sequence after sequence, of each the last at every position.

    A batch advances its sequences in turn. Where a later pass goes back to an earlier position, as
    after a wrong guess, the tokens from there on are no text.
    """
    order = np.argsort(text.sequences, kind="stable")
    places = (text.sequences.astype(np.int64)[order] << 40) + text.positions[order]
    earliest = np.minimum.accumulate(places[::-1])[::-1]  # of this token and all behind it
    kept: Array = order[np.append(places[:-1] < earliest[1:], True)[: len(order)]]
    return kept


class _RouterRows:
    """Router probabilities of the pass in progress: float16 [layers, T, num_experts].

    They stay on their device until the pass is over: one copy, not one per layer.
    """

    def __init__(self, num_layers: int):
        self._rows = new_room((num_layers, 0, 0), torch.float16, torch.device("cpu"))
        self._by_layer = list(self._rows)
        self._next = 0  # layers before it have theirs

    def take(self, layer: int, tokens: int, given: tuple[int, torch.Tensor] | None) -> None:
        """The layer's routing has been recorded; what its thread was given belongs to it."""
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
            self._rows = new_room(shape, torch.float16, probabilities.device)
            self._by_layer = list(self._rows)
            row = self._by_layer[layer]
        row.copy_(probabilities.detach())
        self._next = layer + 1 if layer in (0, self._next) else 0

    def of_pass(self, tokens: int) -> Array | None:
        """float16 [tokens, layers, num_experts], or None where a layer lacks its own."""
        complete = self._next == len(self._rows) and self._rows.shape[1] == tokens
        self._next = 0
        return self._rows.cpu().numpy().swapaxes(0, 1).copy() if complete else None
