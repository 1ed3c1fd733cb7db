"""Records the routing of a live cache as a trace."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch

from moeinf.cache.observers import Array, PassObserver, RoutedPass
from moeinf.cache.passes import Observer
from moeinf.checkpoint.store import ExpertStore
from moeinf.traces.trace import DECODE, PREFILL, Trace


class Recorder(PassObserver, AbstractContextManager["Recorder"]):
    """Keeps the router's choices for every token; made by `ExpertCache.record`.

    A context manager: recording ends with it. Costs one small copy per layer and pass, a few us;
    with the probabilities of all experts, one more and their computation.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        router: bool = False,
        on_exit: Callable[[], None] | None = None,
    ):
        super().__init__(num_layers, num_experts)
        self._on_exit = on_exit
        self._keeps_router = router
        self._given: dict[int, tuple[int, torch.Tensor]] = {}  # by thread: for the layer to come
        self._router_rows: dict[int, _RouterRows] = {}  # by caller
        self._routers: list[Array] = []  # one per part, where recorded
        self._parts: list[tuple[Array, ...]] = []
        self._numbers: dict[int, dict[int, int]] = {}  # by caller: its sequences, as recorded
        self._sequences = 0  # numbers given so far

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
            raise ValueError("nothing was recorded: no forward pass has gone through the cache")
        experts, weights, sequence, phase = (
            np.concatenate(arrays) for arrays in zip(*self._parts, strict=True)
        )
        order = np.argsort(sequence, kind="stable")  # a batch advances its sequences in turn
        return Trace(
            experts=experts[order],
            weights=weights[order],
            router=self._all_router()[order] if self._keeps_router else None,
            sequence=sequence[order],
            phase=phase[order],
            num_experts=self._num_experts,
            model=model,
            source=source,
        )

    def on_pass(self, one: RoutedPass) -> None:
        tokens, info = len(one.experts), one.info
        numbers = self._numbers.setdefault(one.caller, {})
        if info.new_sequence:
            numbers.clear()
        named = range(info.batch) if info.sequences is None else info.sequences
        for name in named:
            if name not in numbers:
                numbers[name] = self._sequences
                self._sequences += 1
        sequence = np.array([numbers[name] for name in named], dtype=np.int32)
        if info.sequences is None:
            sequence = np.repeat(sequence, tokens // info.batch)
        phase = np.full(tokens, PREFILL if info.prefill else DECODE, dtype=np.uint8)
        self._parts.append((one.experts, one.weights, sequence, phase))
        if self._keeps_router:
            rows = self._router_rows.get(one.caller)
            router = None if rows is None else rows.of_pass(tokens)
            if router is not None:
                self._routers.append(router)

    def _all_router(self) -> Array:
        if len(self._routers) != len(self._parts):
            raise ValueError(
                f"router probabilities: expected for every layer of {len(self._parts)} passes, "
                f"found for {len(self._routers)}: hand them to add_router before fused_experts"
            )
        return np.concatenate(self._routers)

    def __exit__(self, *error: object) -> None:
        if self._on_exit is not None:
            self._on_exit()


# Calls the function given with (layer, probabilities [T, num_experts]) before that layer's experts
# are asked for; returns what ends it.
RouterSource = Callable[[Callable[[int, torch.Tensor], None]], Callable[[], None]]


class Recordable(ABC):
    """What can be recorded: one cache, or several that serve one model."""

    store: ExpertStore
    routers: RouterSource | None = None
    """Set by an integration that can listen to the routers of the model that is served."""
    _stop_listening: Callable[[], None] | None = None

    @abstractmethod
    def observe(self, observer: Observer) -> None:
        """Shows it every pass and the routing of every step from now on."""

    @abstractmethod
    def stop_observing(self, kinds: tuple[type, ...]) -> None:
        """Ends `observe` for the observers of these types."""

    def record(self, *, router: bool = False) -> Recorder:
        """Keeps the routing of every step from now on; `trace()` of what it returns gives it back.

        Only what goes through `fused_experts` is seen. Use it as a context manager, or end it with
        `stop_recording`. With `router` the router's probabilities of all experts are kept too:
        those of a model that `moeinf.load` loaded are taken from it (UnsupportedError where it is
        not known how); any other runtime hands them to `Recorder.add_router`.
        """
        self.stop_recording()
        shape = (self.store.num_layers, self.store.num_experts)
        recorder = Recorder(*shape, router=router, on_exit=self.stop_recording)
        if router and self.routers is not None:
            self._stop_listening = self.routers(recorder.add_router)
        self.observe(recorder)
        return recorder

    def stop_recording(self) -> None:
        """Ends `record`; what was recorded stays with the recorder."""
        self.stop_observing((Recorder,))
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None


class _RouterRows:
    """Router probabilities of the pass in progress: float16 [layers, T, num_experts].

    They stay on their device until the pass is over: one copy, not one per layer.
    """

    def __init__(self, num_layers: int):
        self._rows = torch.empty(num_layers, 0, 0, dtype=torch.float16)
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
