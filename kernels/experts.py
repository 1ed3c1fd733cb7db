"""The contract: a MoE layer's expert FFNs computed straight out of strided slot views.

Any runtime with such tensors can call `experts`; where a step needs more experts than there are
slots, it calls `expert_routes` once per wave and `combine` after the last, for the same bits. Both
validate everything before a launch. The module itself can be called: `moeinf.kernels.experts(...)`
is `moeinf.kernels.experts.experts(...)`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import launch, plans
from .decode_plan import decode_plan
from .problem import (
    Problem,
    ReadThrough,
    check_contiguous,
    check_shape,
    check_slots,
    check_unit_stride,
)

NO_SOURCE = (None,) * 4

__all__ = ["ReadThrough", "combine", "expert_routes", "experts"]


def experts(
    hidden: torch.Tensor,
    slot_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    expert_map: torch.Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
    num_experts: int | None = None,
    read_through: ReadThrough | None = None,
    check_ids: bool = True,
    path: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[t] = sum over j, in order, of topk_weights[t, j] * expert(slot_ids[t, j])(hidden[t]).

    | argument | shape | dtype | meaning |
    |---|---|---|---|
    | hidden | [T, H], unit stride in H | W: bfloat16, float16 or float32 | tokens, T >= 1 |
    | slot_ids | [T, k], contiguous | int32 or int64 | slots; -1 = not here, adds nothing |
    | topk_weights | [T, k], contiguous | any float | routing weights |
    | gate_up | [S, 2I, H], any slot stride | W | [S, I, H] when not gated |
    | down | [S, H, I], any slot stride | W | |
    | expert_map | [E], contiguous | int32 or int64 | makes slot_ids expert ids: id -> slot or -1 |
    | gate_up_bias, down_bias | [S, 2I], [S, H] | W or float32 | both or neither |
    | out | [T, H], unit stride in H | W | written and returned; a new tensor if None |

    Options: `activation` one of silu, gelu, gelu_tanh, relu, relu2, swiglu_clamped (with `alpha`
    and `limit`); `gated` False for act(x W1) W2; `interleaved` True if gate and up rows alternate
    instead of lying one after the other; `transposed` True for weights stored as [S, H, 2I] and
    [S, I, H]. `num_experts` (of the layer, not the slots) helps to size prefill tiles and belongs
    to the numerics: pass the same for every call of a layer. `path` forces vector, shared (both up
    to 16 tokens) or grouped. `read_through` (experimental, one token) reads missed experts
    at the given addresses and fills their slots on the way.

    `check_ids` reads the ids back, which waits for the device; a runtime that has just assigned
    the slots itself, or captures a CUDA graph, passes False, and then an id out of range is an
    access out of bounds. Raises ValueError, TypeError or RuntimeError before any launch.
    """
    return prepare(
        hidden, slot_ids, topk_weights, gate_up, down, out, None,
        expert_map=expert_map, activation=activation, gated=gated, interleaved=interleaved,
        transposed=transposed, gate_up_bias=gate_up_bias, down_bias=down_bias, alpha=alpha,
        limit=limit, num_experts=num_experts, read_through=read_through, check_ids=check_ids,
        path=path,
    )()  # fmt: skip


def expert_routes(
    hidden: torch.Tensor,
    slot_ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    routes: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """One wave: writes routes[t, j] [T, k, H] for every present route and leaves the others alone.

    Arguments as for `experts`; pass the tensor it returned as `routes` to the next wave. All routes
    of a token to one expert belong in the same wave. The dtype of `routes` is float32 for up to 16
    tokens, else that of the weights.
    """
    return prepare(hidden, slot_ids, None, gate_up, down, None, routes, **options)()


def prepare(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    out: torch.Tensor | None,
    routes: torch.Tensor | None,
    *,
    expert_map: torch.Tensor | None = None,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    read_through: ReadThrough | None = None,
    check_ids: bool = True,
    path: str | None = None,
    **form: Any,
) -> Callable[[], torch.Tensor]:
    """Everything about a call but its launches, which what it returns makes, once.

    The result is `out`, or `routes` where there are no weights. Of a signature seen before, only
    ids are checked. Until the launches, what lies in the tensors may change, not where they lie.
    """
    source = NO_SOURCE if read_through is None else (
        read_through.gate_up, read_through.down,
        read_through.gate_up_bias, read_through.down_bias,
    )  # fmt: skip
    tensors = [
        hidden, ids, weights, gate_up, down, expert_map, gate_up_bias, down_bias, *source,
        out, routes, None, None, None,
    ]  # fmt: skip
    parts, addresses = plans.signature(tensors)
    key = (parts, read_through is None, path, *form.items())
    plan = plans.PLANS.get(key)
    if plan is not None:
        if check_ids:
            check_slots(ids, expert_map, gate_up.shape[0])
        return plan.prepare(tensors, addresses)
    problem = Problem.of(
        hidden, ids, gate_up, down,
        expert_map=expert_map, gate_up_bias=gate_up_bias, down_bias=down_bias,
        read_through=read_through, check_ids=check_ids, **form,
    )  # fmt: skip
    launch.check_device(hidden.device)
    chosen = launch.check_path(problem, path)
    if weights is not None:
        check_weights(weights, ids)
    check_result(problem, chosen, out, routes)
    if chosen == "grouped":
        return partial(launch.run_grouped, problem, weights, out, routes)
    plan = plans.keep(key, decode_plan(problem, chosen, weights is None, out))
    return plan.prepare(tensors, addresses)


def combine(
    routes: torch.Tensor,
    ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """After the last wave: out[t] = sum over j, in order, of topk_weights[t, j] * routes[t, j].

    `ids` [T, k] (int32 or int64) are any ids with -1 where no wave computed the route. `dtype`
    defaults to that of `out`, else of `routes`.
    """
    if dtype is None:
        dtype = routes.dtype if out is None else out.dtype
    check = partial(check_combine, routes, ids, topk_weights, out, dtype)
    return launch.run_combine(routes, ids, topk_weights, out, dtype, check)


def check_combine(
    routes: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    launch.check_device(routes.device)
    if routes.ndim != 3 or routes.numel() == 0:
        raise ValueError(f"routes: expected [T, k, H], found {tuple(routes.shape)}")
    check_contiguous("routes", routes)
    T, k, H = routes.shape
    check_shape("ids", ids, (T, k))
    check_contiguous("ids", ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: expected int32 or int64, found {ids.dtype}")
    if ids.device != routes.device:
        raise ValueError(f"ids: expected {routes.device}, found {ids.device}")
    check_weights(weights, ids)
    if out is not None:
        check_out(out, (T, H), dtype, routes.device)


def check_weights(weights: torch.Tensor, ids: torch.Tensor) -> None:
    check_shape("topk_weights", weights, tuple(ids.shape))
    check_contiguous("topk_weights", weights)
    if not weights.dtype.is_floating_point or weights.element_size() > 4:
        raise TypeError(
            f"topk_weights: expected float32, bfloat16 or float16, found {weights.dtype}"
        )
    if weights.device != ids.device:
        raise ValueError(f"topk_weights: expected {ids.device}, found {weights.device}")


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    check_shape(name, tensor, shape)
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, found {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected {device}, found {tensor.device}")


def check_out(
    out: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    check_tensor("out", out, shape, dtype, device)
    check_unit_stride("out", out)


def check_result(
    problem: Problem, path: str, out: torch.Tensor | None, routes: torch.Tensor | None
) -> None:
    device = problem.hidden.device
    if out is not None:
        check_out(out, (problem.T, problem.H), problem.hidden.dtype, device)
    if routes is not None:
        shape = (problem.T, problem.k, problem.H)
        check_tensor("routes", routes, shape, launch.routes_dtype(problem, path), device)
        check_contiguous("routes", routes)


class CallableModule(types.ModuleType):
    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        return experts(*args, **options)


sys.modules[__name__].__class__ = CallableModule
