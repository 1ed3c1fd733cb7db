"""The fused expert FFN out of cache slots, as a torch operator.

    y[t] = sum over k of topk_weights[t, k] * down(act(gate(x[t])) * up(x[t]))

The sum runs in the order of k, each route on its own, so that the result does not depend on which
experts were resident, on the policy, the budget or the number of waves: it is identical to the bit.
"""

from __future__ import annotations

import weakref

import torch

from moeinf.cache.cache import ExpertCache

_caches: weakref.WeakValueDictionary[int, ExpertCache] = weakref.WeakValueDictionary()

_library = torch.library.Library("moeinf", "DEF")
_library.define(
    "fused_experts(Tensor hidden, Tensor topk_ids, Tensor topk_weights, int cache, int layer)"
    " -> Tensor"
)


def fused_experts(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    cache: ExpertCache,
    layer: int,
) -> torch.Tensor:
    """Routes each token through its experts, reading their weights out of `cache`.

    Args:
        hidden: [T, H], float32, bfloat16 or float16, where the cache is: on the cpu or its GPU.
        topk_ids: [T, k], int64 or int32, experts of this layer; -1 adds nothing.
        topk_weights: [T, k], floating point.
        cache: where the experts are.
        layer: MoE layer, counted from 0.

    Returns:
        [T, H] in the dtype of `hidden`.

    Raises:
        ValueError: shapes, dtypes, ids or a weight (NaN, infinite) that make no sense. On a GPU
            weights are not looked at, for that would wait for the device.
        ReadError: an expert could not be read; the cache stays usable.
    """
    handle = id(cache)
    if _caches.get(handle) is not cache:
        _caches[handle] = cache
    return torch.ops.moeinf.fused_experts(hidden, topk_ids, topk_weights, handle, layer)


def _fused_experts(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    cache: int,
    layer: int,
) -> torch.Tensor:
    owner = _caches.get(cache)
    if owner is None:
        raise ValueError(f"no cache with handle {cache}: it has been released")
    return owner.compute(hidden, topk_ids, topk_weights, layer)


def _fused_experts_fake(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    cache: int,
    layer: int,
) -> torch.Tensor:
    return torch.empty_like(hidden)


_library.impl("fused_experts", _fused_experts, "CPU")
_library.impl("fused_experts", _fused_experts, "CUDA")
torch.library.register_fake("moeinf::fused_experts", _fused_experts_fake, lib=_library)
