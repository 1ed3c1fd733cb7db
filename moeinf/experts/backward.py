"""The gradients of the fused experts' inputs; the experts themselves are frozen.

The forward pass keeps its inputs alone. The backward pass reads the experts again from the slots,
in as many waves as the slots take, and lets torch differentiate each expert on its own in float32.
The gradients of a token's routes are added in the order of k, so they do not depend on the waves.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from moeinf.cache.cache import named
from moeinf.errors import UnsupportedError
from moeinf.experts.torch_products import product
from moeinf.kernels.forms import ExpertForm, ExpertMatrices
from moeinf.kernels.gates import reference


def register(library: torch.library.Library) -> None:
    """Makes the `fused_experts` of this library differentiable, once."""
    library.define(
        "fused_experts_backward(Tensor grad, Tensor hidden, Tensor topk_ids, Tensor topk_weights,"
        " str cache, int layer) -> (Tensor, Tensor)"
    )
    for device in ("CPU", "CUDA"):
        library.impl("fused_experts_backward", _gradients, device)
    torch.library.register_fake("moeinf::fused_experts_backward", _fake, lib=library)
    library.impl("fused_experts", partial(_apply, _Forward), "Autograd")
    library.impl("fused_experts_backward", partial(_apply, _Backward), "Autograd")


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedError("fused_experts: torch.func cannot differentiate it, backward() can")
    return function.apply(*inputs)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.moeinf.fused_experts(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        hidden, topk_ids, topk_weights, ctx.cache, ctx.layer = inputs
        ctx.save_for_backward(hidden, topk_ids, topk_weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weights = torch.ops.moeinf.fused_experts_backward(
            grad, *ctx.saved_tensors, ctx.cache, ctx.layer
        )
        return hidden, None, weights, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> None:
        raise UnsupportedError("fused_experts: has no derivative in forward mode")


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.moeinf.fused_experts_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise UnsupportedError("fused_experts: its gradients have no derivative")

    jvp = backward


def _fake(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    cache: str,
    layer: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden.new_empty(hidden.shape), topk_weights.new_empty(topk_weights.shape)


def _gradients(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    name: str,
    layer: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of hidden [T, H] and of topk_weights [T, k], where `grad` [T, H] is that of the
    output."""
    cache = named(name)
    store = cache.store
    ids = topk_ids.cpu()
    routed = ids[(ids >= 0) & (ids < store.num_experts)]
    of_routes = torch.zeros((*ids.shape, hidden.shape[1]), device=hidden.device)
    of_weights = torch.zeros(ids.shape, device=hidden.device)
    for lease in cache.waves(layer, routed.unique().tolist()):
        matrices = store.layout.matrices(cache.pool())
        for expert, slot in zip(lease.experts, lease.slots, strict=True):
            route = (ids == expert).nonzero(as_tuple=True)
            token, place = (index.to(hidden.device) for index in route)
            of_routes[token, place], of_weights[token, place] = _of_expert(
                matrices, store.form, slot, hidden[token], topk_weights[token, place], grad[token]
            )
    total = torch.zeros_like(of_routes[:, 0])
    for j in range(ids.shape[1]):
        total += of_routes[:, j]
    return total.to(hidden.dtype), of_weights.to(topk_weights.dtype)


def _of_expert(
    matrices: ExpertMatrices,
    form: ExpertForm,
    slot: int,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the rows of one expert: hidden, grad [n, H], weight [n]; all in float32."""
    gate, up, down = matrices.gate, matrices.up, matrices.down

    def expert(x: torch.Tensor) -> torch.Tensor:
        first = product(x, [gate] if up is None else [gate, up], slot)
        parts = first.split(gate.values.shape[1], dim=1)
        return product(reference(form.gate, *parts), [down], slot)

    grad = grad.float()
    # Not autograd, which is off inside an operator.
    y, pull, *_ = torch.func.vjp(expert, hidden.float())
    (of_hidden,) = pull(grad * weight.float()[:, None])
    return of_hidden, (grad * y).sum(1)
