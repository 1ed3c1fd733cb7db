"""Gate lookahead: the next MoE layer's router, run on this layer's input, names its experts early.

At decode the input of one MoE layer is close to the input of the next. It is closer with the shared
expert's output added, if the model has one. The router's choice goes to the cache's prefetcher. The
prefetcher reads experts within its budget, and says when predictions do not pay; then nothing is
computed here. The model does not change: forward hooks on its modules see their inputs.

A router that looks the experts up by token id (the hash layers of DeepSeek-V4) names them exactly.

The prediction is made when its input is known: before this layer's experts are computed, or after
them in models that compute the shared expert last. On a GPU the prediction must be enqueued before
the host waits for this layer's ids, so that it costs no wait of its own. So on a GPU the shared
expert's output is used only if it was computed before the routed experts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from moeinf.cache.cache import ExpertCache
from moeinf.integrations.transformers.blocks import Router, try_router

MOST_TOKENS = 4
"""Of one forward pass. More of them use so many experts that a prediction says little."""


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.shared: dict[int, torch.Tensor] = {}  # by layer: outputs of shared experts, on a GPU
        self.ids: torch.Tensor | None = None  # of the pass, where a router needs them


class GateLookahead:
    """Hooks on the MoE blocks of a model. `blocks[i]` is MoE layer i.

    A hook refers to the next block and never to an earlier one, so that a model that is no longer
    used is gone at once.
    """

    def __init__(self, blocks: Sequence[Any], cache: ExpertCache):
        self.cache = cache
        self._mine = _OfThread()
        routers = [try_router(block).router for block in blocks]
        self.needs_ids = [router.needs_ids for router in routers]
        for layer, (block, router) in enumerate(zip(blocks[:-1], routers[1:], strict=True)):
            self._watch(layer, block, router)

    def _watch(self, layer: int, block: Any, router: Router) -> None:
        shared = _module(block, "shared_expert") or _module(block, "shared_experts")
        shared_gate = _module(block, "shared_expert_gate")
        if router.needs_ids:
            block.register_forward_pre_hook(self._keep_ids, with_kwargs=True)
        if shared is None or self.cache.on_gpu:
            block.experts.register_forward_pre_hook(
                lambda _, args: self._predict(
                    layer + 1, router, args[0], self._mine.shared.get(layer), shared_gate
                )
            )
        else:
            shared.register_forward_hook(
                lambda _, args, output: self._predict(
                    layer + 1, router, args[0], output, shared_gate
                )
            )
        if shared is not None and self.cache.on_gpu:
            shared.register_forward_hook(
                lambda _, __, output: self._mine.shared.update({layer: output})
            )
            block.register_forward_hook(lambda *_: self._forget(layer))

    def _keep_ids(self, _: Any, __: Any, kwargs: dict[str, Any]) -> None:
        self._mine.ids = kwargs.get("input_ids")

    def _forget(self, layer: int) -> None:
        self._mine.shared.pop(layer, None)

    @torch.no_grad()
    def _predict(
        self,
        layer: int,
        router: Router,
        hidden: torch.Tensor,
        shared: torch.Tensor | None,
        shared_gate: Any = None,
    ) -> None:
        """hidden, shared: [..., H], input of the block before `layer`, and its shared part."""
        if hidden.numel() > MOST_TOKENS * hidden.shape[-1] or not self.cache.wants_predictions:
            return
        if shared is not None:
            # forward() rather than a call: hooks of others are for what the model computes.
            scale = torch.sigmoid(shared_gate.forward(hidden)) if shared_gate else 1.0
            hidden = hidden + scale * shared.reshape(hidden.shape)
        self.cache.predict(layer, router.choose(hidden, self._mine.ids))


def _module(block: Any, name: str) -> Any:
    found = getattr(block, name, None)
    return found if isinstance(found, torch.nn.Module) else None
