"""The CUDA backend: computes a step's waves out of the slots where copies put them.

The host waits once per step, for the router's ids. All later work is ordered on the stream: the
map of a wave, the wait for its bytes, the kernels, and the mark after which its slots may be
overwritten.

Most steps are one wave and use the fused form of the kernels. A step of several waves uses the form
that writes the output of each route, and one sum at its end. Both add in the same order, so the
result does not depend on the number of waves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moeinf.cache.cache import ExpertCache
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import UnsupportedError
from moeinf.experts import torch_products
from moeinf.experts.checks import check_tensors
from moeinf.experts.marks import Marks
from moeinf.kernels.forms import PLAIN_FORMATS, ExpertMatrices


class CudaExperts:
    """Computes experts out of the slots of one cache in GPU memory. Thread-safe.

    It keeps what it needs of the cache, not the cache, which ends it.
    """

    def __init__(self, cache: ExpertCache):
        if cache.streams is None:
            raise ValueError("CudaExperts: the slots of this cache lie in RAM")
        self.store = cache.store
        self.core = cache.core
        self.streams = cache.streams
        self.passes = cache.passes
        self.is_fake = self.streams.is_fake
        self.device = cache.device
        self.hidden = self.store.layout.hidden
        self._triton = _triton_kernels(on_cpu=self.is_fake)
        self.dtype = _dtype_of_tokens(self.store)
        cache.kernels = "torch" if self._triton is None else "triton"
        self._lock = threading.Lock()  # of the matrices
        self._matrices = self.store.layout.matrices(torch.from_dlpack(self.core.leased_rows()))
        self._slots = self.core.slots

    def run_plain(
        self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, layer: int
    ) -> Tensor | None:
        """None, and nothing has happened, for a tensor without memory."""
        return None if hidden.is_meta else self.run(hidden, topk_ids, topk_weights, layer)

    def run(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, layer: int) -> Tensor:
        """See `moeinf.fused_experts`."""
        check_tensors(hidden, topk_ids, topk_weights, self.hidden, device=self.device)
        if topk_ids.numel() == 0:
            return hidden.new_zeros(hidden.shape)
        converted = self.dtype is not None and hidden.dtype != self.dtype
        rows = (hidden.to(self.dtype) if converted else hidden).contiguous()
        ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
        tokens, top_k = ids.shape
        passes = self.passes
        stream = self.streams.current()
        with stream.lock:
            step = stream.core
            marks = Marks()
            marks.begin("moeinf::acquire")
            try:
                step.copy_ids(
                    layer,
                    ids.data_ptr(),
                    ids.dtype == torch.int64,
                    tokens,
                    top_k,
                    stream.map_address,
                    passes.current.prefill,
                    passes.takes_first_step(),
                    passes.caller,
                )
                # Most steps are one wave. It is prepared while the ids travel to the host.
                whole = None if converted else self._prepared(rows, ids, weights, stream.expert_map)
                wave = step.begin()
                marks.begin("moeinf::compute")
                stream.hand_over_predictions()
                if passes.observers:
                    passes.observe(layer, torch.from_numpy(step.ids()), weights)
                if wave is None:  # no id names an expert
                    return hidden.new_zeros(hidden.shape)
                if wave.names_past_the_end:  # the sum knows only -1 as "no expert"
                    whole = None
                    ids = ids.masked_fill(ids == self.store.num_experts, -1)
                routes = None
                while wave is not None:
                    if self.is_fake:  # the host computes, so it must wait for map and bytes
                        step.synchronize()
                    if whole is not None and wave.whole:
                        out = whole()
                        step.next()
                        return out
                    routes = self._wave(rows, ids, stream.expert_map, routes, wave.slots)
                    wave = step.next()
            except BaseException:
                step.release()
                raise
            finally:
                marks.end()
        combine: Any = torch_products.combine if self._triton is None else self._triton.combine
        summed: Tensor = combine(routes, ids, weights, dtype=hidden.dtype)
        return summed

    def _prepared(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, expert_map: Tensor
    ) -> Callable[[], Tensor] | None:
        """A step in one wave: two launches instead of three, for the same bits.

        resize() never moves slots, so a prepared launch stays valid after it.
        """
        if self._triton is None:
            return None
        launch: Callable[[], Tensor] = self._triton.prepare(
            hidden,
            ids,
            weights,
            self._matrices,
            self.store.form,
            expert_map=expert_map,
            num_experts=self.store.num_experts,
            check_ids=False,  # the core checks them on the host
        )
        return launch

    def _wave(
        self,
        hidden: Tensor,
        ids: Tensor,
        expert_map: Tensor,
        routes: Tensor | None,
        slots: int,
    ) -> Tensor:
        matrices, form = self._matrices_of(slots), self.store.form
        if self._triton is None:
            return torch_products.expert_routes(
                hidden, ids, matrices, form, expert_map=expert_map, routes=routes
            )
        wave: Tensor = self._triton.expert_routes(
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

    def _matrices_of(self, slots: int) -> ExpertMatrices:
        """Views of the whole pool. They are made again after the pool has grown.

        Views of a larger pool stay valid while it shrinks: leased slots stay until their release.
        """
        with self._lock:
            if slots > self._slots:
                rows = torch.from_dlpack(self.core.leased_rows())
                self._matrices = self.store.layout.matrices(rows)
                self._slots = slots
            return self._matrices


def _dtype_of_tokens(store: ExpertStore) -> torch.dtype | None:
    """That of matrices with one element per value and no scales; None where there are none: tokens
    of any dtype. Raises UnsupportedError for two dtypes: the kernels multiply what is alike."""
    found = {
        name: matrix.format.values
        for name, matrix in store.layout.named.items()
        if matrix.format.values in PLAIN_FORMATS and not matrix.format.scaled
    }
    if len(set(found.values())) > 1:
        raise UnsupportedError(
            f"{store.paths[0]}: {store.modules[0]}: expected matrices without scales in one dtype "
            "on a GPU, found "
            + ", ".join(f"{name} in {PLAIN_FORMATS[dtype]}" for name, dtype in found.items())
        )
    return next(iter(found.values()), None)


def _triton_kernels(*, on_cpu: bool) -> Any:
    """The kernels' module, or None where Triton is absent or cannot compute on that device."""
    try:
        from moeinf.kernels import checks, experts
    except ImportError:
        return None
    return None if on_cpu and not checks.INTERPRETED else experts
