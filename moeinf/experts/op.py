"""The fused expert FFN out of cache slots, as a torch operator.

    y[t] = sum over k of topk_weights[t, k] * down(act(gate(x[t])) * up(x[t]))

Each route is computed on its own, and the sum runs in the order of k. So the result is identical to
the bit for every policy, budget, number of waves and set of resident experts.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch.autograd import forward_ad

from moeinf.cache.cache import ExpertCache, named
from moeinf.cache.passes import ForwardPass
from moeinf.experts import backward
from moeinf.experts.cpu import CpuExperts
from moeinf.experts.cuda import CudaExperts
from moeinf.experts.marks import is_watched

_library = torch.library.Library("moeinf", "DEF")
_library.define(
    "fused_experts(Tensor hidden, Tensor topk_ids, Tensor topk_weights, str cache, int layer)"
    " -> Tensor"
)
_library.define(
    "fused_experts_out(Tensor hidden, Tensor topk_ids, Tensor topk_weights, str cache, int layer,"
    " Tensor(a!) out) -> ()"
)
_operator = torch.ops.moeinf.fused_experts.default  # half as much Python per call as by its name


_backends: dict[str, CpuExperts | CudaExperts] = {}  # by the name of a cache, while it lives
_choosing = threading.Lock()


def backend_of(name: str) -> CpuExperts | CudaExperts:
    """The backend of the cache of that name. The memory of its slots decides, once.

    Raises ValueError once the cache has been released.
    """
    backend = _backends.get(name)
    if backend is not None:
        return backend
    with _choosing:
        cache = named(name)
        if name not in _backends:
            _backends[name] = CpuExperts(cache) if cache.streams is None else CudaExperts(cache)
            weakref.finalize(cache, _backends.pop, name, None).atexit = False
        return _backends[name]


def fused_experts(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    cache: ExpertCache,
    layer: int,
    *,
    forward_pass: ForwardPass | None = None,
) -> torch.Tensor:
    """Routes each token through its experts, reading their weights out of `cache`.

    Args:
        hidden: [T, H], float32, bfloat16 or float16, where the cache is: on the cpu or its GPU. On
            a GPU it is rounded to the dtype of the weights first.
        topk_ids: [T, k], int64 or int32, experts of this layer; -1 and the number of experts add
            nothing.
        topk_weights: [T, k], floating point.
        cache: where the experts are.
        layer: MoE layer, counted from 0.
        forward_pass: what the step belongs to, one object for all layers of a pass; without it,
            what `cache.begin_pass` last said on this thread. For policies and traces. Not for
            functions that torch.compile traces: they call `begin_pass` before.

    Returns:
        [T, H] in the dtype of `hidden`.

    Raises:
        ValueError: shapes, dtypes, devices or ids that make no sense. NaN is none of them: the
            tokens that it belongs to, and no other, become NaN.
        ReadError: an expert could not be read; the cache stays usable.
    """
    if forward_pass is not None:
        cache.begin_pass(forward_pass)
    if (
        torch.compiler.is_compiling()
        or is_watched()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (torch.is_grad_enabled() and (hidden.requires_grad or topk_weights.requires_grad))
        or not type(hidden) is type(topk_ids) is type(topk_weights) is torch.Tensor
    ):
        return _operator(hidden, topk_ids, topk_weights, cache.name, layer)
    out = backend_of(cache.name).run_plain(hidden, topk_ids, topk_weights, layer)
    if out is None:
        with torch._C._AutoDispatchBelowAutograd():
            return _operator(hidden, topk_ids, topk_weights, cache.name, layer)
    return out


def fused_experts_out(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    cache: ExpertCache,
    layer: int,
    *,
    out: torch.Tensor,
) -> None:
    """`fused_experts` into `out`, [T, H] in the dtype of `hidden`, for runtimes whose graphs need
    results at fixed addresses. `out` may be `hidden`. Inference only: ValueError with gradients."""
    if torch.is_grad_enabled() and (hidden.requires_grad or topk_weights.requires_grad):
        raise ValueError("fused_experts_out has no gradients: call fused_experts")
    torch.ops.moeinf.fused_experts_out(hidden, topk_ids, topk_weights, cache.name, layer, out)


def _fused_experts_out(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    cache: str,
    layer: int,
    out: torch.Tensor,
) -> None:
    _fused_experts_out_fake(hidden, ids, weights, cache, layer, out)
    out.copy_(backend_of(cache).run(hidden, ids, weights, layer))


def _fused_experts_out_fake(hidden: torch.Tensor, *others: Any) -> None:
    out = others[-1]
    found, wanted = (
        f"{str(one.dtype)[6:]} {list(one.shape)} on {one.device}" for one in (out, hidden)
    )
    if found != wanted:
        raise ValueError(f"out: expected {wanted}, as hidden is, found {found}")


def _fused_experts(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, cache: str, layer: int
) -> torch.Tensor:
    return backend_of(cache).run(hidden, ids, weights, layer)


def _fused_experts_fake(
    hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, *_: Any
) -> torch.Tensor:
    devices = {tensor.device for tensor in (hidden, topk_ids, topk_weights)}
    if len(devices) > 1:  # torch takes this way if one tensor alone is on the meta device
        raise ValueError(
            "hidden, topk_ids and topk_weights: expected one device, found "
            + ", ".join(sorted(str(device) for device in devices))
        )
    return hidden.new_empty(hidden.shape)  # contiguous, as backends make it


_library.impl("fused_experts", _fused_experts, "CPU")
_library.impl("fused_experts", _fused_experts, "CUDA")
for device in ("CPU", "CUDA"):
    _library.impl("fused_experts_out", _fused_experts_out, device)
torch.library.register_fake("moeinf::fused_experts_out", _fused_experts_out_fake, lib=_library)
torch.library.register_fake("moeinf::fused_experts", _fused_experts_fake, lib=_library)
backward.register(_library)
