"""The experts modules of a served model, and the implementation "moeinf" that they are served by.

The weights of such a module are not in it, so no other implementation can compute it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeinf.cache.cache import ExpertCache
from moeinf.errors import UnsupportedError
from moeinf.experts.op import fused_experts
from moeinf.integrations.transformers.whole import class_of

IMPLEMENTATION = "moeinf"


def serve(module: Any, cache: ExpertCache, layer: int, block: torch.nn.Module) -> None:
    """From now on the module computes out of the cache, as MoE layer `layer`.

    `block` is the module around it. A router that has one output more than there are experts can
    choose none: it then names some expert with a weight of 0, which must not be read.
    """
    none = cache.store.num_experts + 1
    tensors = [*block.named_parameters(), *block.named_buffers()]
    module.moeinf_skips = any(tensor.shape[:1] == (none,) for _, tensor in tensors)
    module.moeinf_norms_routes = getattr(module, "has_post_expert_norm", False)
    module.moeinf_cache = cache
    module.moeinf_layer = layer
    module.__class__ = class_of(_Served, type(module))


class _Served:
    """A base of the classes of served modules."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k] -> [T, H]."""
        asked = self.config._experts_implementation
        if asked != IMPLEMENTATION:
            raise UnsupportedError(
                f"{type(self).__name__}: the experts of this model are served by moeinf and not in "
                f"memory: expected experts_implementation={IMPLEMENTATION!r}, found {asked!r}"
            )
        cache, layer = self.moeinf_cache, self.moeinf_layer
        if self.moeinf_skips:
            top_k_index = top_k_index.masked_fill(top_k_weights == 0, cache.store.num_experts)
        if self.moeinf_norms_routes:
            routes = _each_route(hidden_states, top_k_index, top_k_weights, cache, layer)
            return (self.post_expert_norm(routes) * top_k_weights[..., None]).sum(1)
        return fused_experts(hidden_states, top_k_index, top_k_weights, cache, layer)


def _each_route(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    cache: ExpertCache,
    layer: int,
) -> torch.Tensor:
    """What each expert gives, [T, k, H], before weights: each route as a token of its own, in one
    step. The observers of the cache see the tokens as they are."""
    tokens, top_k = topk_ids.shape
    passes = cache.passes
    observers = passes.observers
    if observers:
        passes.observe(layer, topk_ids.cpu(), topk_weights)
    passes.observers = []  # of this thread
    try:
        routes = fused_experts(
            hidden.repeat_interleave(top_k, 0),
            topk_ids.reshape(-1, 1),
            topk_weights.new_ones(tokens * top_k, 1),
            cache,
            layer,
        )
    finally:
        passes.observers = observers
    return routes.view(tokens, top_k, -1)


def _refuse(self: Any, *_: Any, **__: Any) -> torch.Tensor:
    """What transformers runs for a model that was told so by its configuration alone."""
    raise UnsupportedError(
        f"{type(self).__name__}: experts_implementation={IMPLEMENTATION!r} is for models that "
        "moeinf.load loaded: call moeinf.load(path) in place of from_pretrained"
    )


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _refuse)
