"""The GPU half of `fused_experts`: a step's waves, each computed where the copy engine put it.

The host waits once per step, for the router's ids. Everything after that is order on the reader's
stream: the map of a wave, the wait for its bytes, the kernels, the mark after which its rows may be
overwritten.

Every step takes the per-route form of the kernels and one sum at its end, in however many waves its
experts come: so the waves cannot show in the result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from moeinf import _core
from moeinf.cache.devices import torch_device
from moeinf.checkpoint.store import ExpertStore
from moeinf.experts import torch_products
from moeinf.experts.cpu import check_tensors
from moeinf.kernels.forms import ExpertMatrices


class CudaExperts:
    """Computes the experts of one store out of a cache's slots in GPU memory. Thread-safe.

    `kernels` says which kernels compute: triton, or torch where Triton is absent.
    """

    def __init__(self, store: ExpertStore, core: _core.ExpertCache, device: _core.CudaDevice):
        self.store = store
        self.core = core
        self.is_fake = device.is_fake
        self.device = torch_device(device)
        self.hidden = store.layout["down"].shape[0]
        self.dtype = store.layout["down"].dtype
        self._triton = _triton_kernels(on_cpu=device.is_fake)
        self.kernels = "torch" if self._triton is None else "triton"
        self._lanes: dict[int, _Lane] = {}
        self._lock = threading.Lock()  # of _lanes and the views
        self._rows = 0
        self._matrices: ExpertMatrices | None = None

    def run(
        self,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        layer: int,
        *,
        prefill: bool = False,
        new_sequence: bool = False,
        on_ids: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """See `moeinf.fused_experts`; `prefill` and `new_sequence` are for policies and traces.

        `on_ids` is given the ids on the host, which the step has there anyway.
        """
        check_tensors(hidden, topk_ids, topk_weights, self.hidden, device=self.device)
        if hidden.shape[0] == 0:
            return torch.empty_like(hidden)
        converted = hidden.dtype != self.dtype
        rows = (hidden.to(self.dtype) if converted else hidden).contiguous()
        ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
        lane = self._lane()
        with lane.lock:
            reader = lane.reader
            reader.ask(
                layer,
                ids.data_ptr(),
                ids.dtype == torch.int64,
                *ids.shape,
                lane.map.data_ptr(),
                prefill=prefill,
                new_sequence=new_sequence,
            )
            # Most steps are one wave: made ready while the ids are on their way.
            whole = None if converted else self._prepared(rows, ids, weights, lane.map)
            reader.begin()
            try:
                lane.hand_over_predictions()
                if on_ids is not None:
                    on_ids(torch.from_numpy(reader.ids()))
                routes = None
                while reader.next():
                    if self.is_fake:  # the host computes, so it waits for map and bytes itself
                        reader.synchronize()
                    if whole is not None and reader.wave_is_whole:
                        return whole()
                    routes = self._wave(rows, ids, lane.map, routes)
                    reader.done()
            finally:
                reader.release()
        if routes is None:  # every id is -1
            return torch.zeros_like(hidden)
        combine: Any = torch_products.combine if self._triton is None else self._triton.combine
        out: torch.Tensor = combine(routes, ids, weights, dtype=hidden.dtype)
        return out

    def predict(self, layer: int, choices: torch.Tensor) -> None:
        """Has the prefetcher told of a router's choices [T, k] right after the ids of the stream's
        next step have come, when the host can look at both without another wait."""
        on_host = choices.clone() if self.is_fake else _to_pinned(choices)
        lane = self._lane()
        with lane.lock:
            lane.predictions.append((layer, on_host))

    def _prepared(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        expert_map: torch.Tensor,
    ) -> Callable[[], torch.Tensor] | None:
        """A step in one wave: two launches instead of three, for the same bits.

        A resize moves no slot, so what is made ready before it holds behind it.
        """
        if self._triton is None:
            return None
        launch: Callable[[], torch.Tensor] = self._triton.prepare(
            hidden,
            ids,
            weights,
            self._current_matrices(),
            self.store.form,
            expert_map=expert_map,
            num_experts=self.store.num_experts,
            check_ids=False,  # the core checks them on the host
        )
        return launch

    def _wave(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        expert_map: torch.Tensor,
        routes: torch.Tensor | None,
    ) -> torch.Tensor:
        matrices, form = self._current_matrices(), self.store.form
        if self._triton is None:
            return torch_products.expert_routes(
                hidden, ids, matrices, form, expert_map=expert_map, routes=routes
            )
        wave: torch.Tensor = self._triton.expert_routes(
            hidden,
            ids,
            matrices,
            form,
            expert_map=expert_map,
            routes=routes,
            num_experts=self.store.num_experts,
            check_ids=False,  # the core checked them on the host
        )
        return wave

    def _current_matrices(self) -> ExpertMatrices:
        """Views of the whole pool, taken again where another thread has resized it since."""
        with self._lock:
            rows = self.core.slots
            if self._matrices is None or rows != self._rows:
                self._matrices = self.store.layout.matrices(torch.from_dlpack(self.core))
                self._rows = rows
            return self._matrices

    def _lane(self) -> _Lane:
        stream = 0 if self.is_fake else torch.cuda.current_stream(self.device).cuda_stream
        with self._lock:
            lane = self._lanes.get(stream)
            if lane is None:
                lane = _Lane(self.core, stream, self.store.num_experts, self.device)
                self._lanes[stream] = lane
            return lane


class _Lane:
    """What the steps of one stream share: a reader, and a map on the device: expert to row."""

    def __init__(
        self, core: _core.ExpertCache, stream: int, num_experts: int, device: torch.device
    ):
        self.lock = threading.Lock()
        self.core = core
        self.reader = _core.DeviceReader(core, stream)
        self.predictions: list[tuple[int, torch.Tensor]] = []  # layer, choices on their way
        self.map = torch.empty(num_experts, dtype=torch.int32, device=device)

    def hand_over_predictions(self) -> None:
        """Called when the stream has passed them."""
        for layer, choices in self.predictions:
            self.core.predict(layer, distinct(choices))
        self.predictions.clear()


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that the current stream will have made; the host does not wait for it."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def distinct(choices: torch.Tensor) -> list[int]:
    """The experts of a router's choices [T, k], each once, first choices first."""
    return list(dict.fromkeys(choices.T.flatten().tolist()))


def _triton_kernels(*, on_cpu: bool) -> Any:
    """The kernels' module, or None where Triton is absent or cannot compute on that device."""
    try:
        from moeinf.kernels import checks, experts
    except ImportError:
        return None
    return None if on_cpu and not checks.INTERPRETED else experts
