"""The contract: a MoE layer's expert FFNs computed straight out of strided slot views.

Any runtime with such tensors can call `fused_experts`. Where a step needs more experts than there
are slots, the runtime calls `expert_routes` once per wave and `combine` after the last wave, for
the same bits. All of them check everything before a launch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from . import checks, launch_plan, paths
from .forms import ExpertForm, ExpertMatrices

__all__ = ["combine", "expert_routes", "fused_experts", "prepare"]


def fused_experts(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    topk_weights: torch.Tensor,
    matrices: ExpertMatrices,
    form: ExpertForm,
    *,
    expert_map: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    num_experts: int | None = None,
    check_ids: bool = True,
    path: str | None = None,
) -> torch.Tensor:
    """out[t] = sum over j, in order, of topk_weights[t, j] * expert(ids[t, j])(hidden[t]).

    | argument | shape | dtype | meaning |
    |---|---|---|---|
    | hidden | [T, H], unit stride in H | bfloat16, float16 or float32 | tokens, T >= 1 |
    | ids | [T, k], contiguous | int32 or int64 | slots; -1 = not here, adds nothing |
    | topk_weights | [T, k], contiguous | float32, bfloat16 or float16 | routing weights |
    | matrices | see ExpertMatrices | by weight format | of gate, of up and of down |
    | form | see ExpertForm | | what an expert computes |
    | expert_map | [E], contiguous | int32 or int64 | makes ids expert ids: id -> slot or -1 |
    | out | [T, H], unit stride in H | as hidden | written and returned; a new tensor if None |

    Biases are in the dtype of the tokens or in float32. Weights are read fastest where they are
    contiguous along the summed dimension, or else along rows; any other strides are correct and
    slow.

    `num_experts` (of the layer, not the slots) helps to size prefill tiles and belongs to the
    numerics: pass the same for every call of a layer. `path` forces vector, shared (both up to 16
    tokens) or grouped: for tests and benchmarks.

    `check_ids` reads the ids back, which waits for the device. A runtime that has just assigned
    the slots itself, or captures a CUDA graph, passes False; then an id out of range is an access
    out of bounds. Raises ValueError, TypeError or RuntimeError before any launch.
    """
    return prepare(
        hidden, ids, topk_weights, matrices, form, expert_map=expert_map, out=out,
        num_experts=num_experts, check_ids=check_ids, path=path,
    )()  # fmt: skip


def expert_routes(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    matrices: ExpertMatrices,
    form: ExpertForm,
    *,
    expert_map: torch.Tensor | None = None,
    routes: torch.Tensor | None = None,
    num_experts: int | None = None,
    check_ids: bool = True,
    path: str | None = None,
) -> torch.Tensor:
    """One wave: writes routes[t, j] [T, k, H] for every present route and leaves the others alone.

    Arguments as for `fused_experts`; pass the tensor it returned as `routes` to the next wave. All
    routes of a token to one expert belong in the same wave. The dtype of `routes` is float32 for up
    to 16 tokens, else that of the tokens.
    """
    return prepare(
        hidden, ids, None, matrices, form, expert_map=expert_map, routes=routes,
        num_experts=num_experts, check_ids=check_ids, path=path,
    )()  # fmt: skip


def prepare(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    matrices: ExpertMatrices,
    form: ExpertForm,
    *,
    expert_map: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    routes: torch.Tensor | None = None,
    num_experts: int | None = None,
    check_ids: bool = True,
    path: str | None = None,
) -> Callable[[], torch.Tensor]:
    """Everything about a call but its launches; what it returns launches them, once.

    The result is `out`, or `routes` where topk_weights is None. Of a signature seen before, only
    the ids are checked. Until the launches the values in the tensors may change, but no tensor may
    move.
    """
    tensors = [hidden, ids, topk_weights, expert_map, out, routes]
    parts, addresses = launch_plan.signature(tensors)
    weights_key, weights_addresses = launch_plan.MatricesSignature.of(matrices)
    tensors += [None, None, None, *matrices.tensors]
    addresses += [0, 0, 0, *weights_addresses]
    key = (parts, weights_key, form, num_experts, path)
    plan = launch_plan.PLANS.get(key)
    if plan is None:
        arguments = checks.check_arguments(
            hidden, ids, topk_weights, matrices, form, expert_map, num_experts
        )
        checks.check_device(hidden.device)
        chosen = paths.check_path(arguments, path)
        if out is not None:
            checks.check_out(out, (arguments.T, arguments.H), arguments.dtype, arguments.device)
        if routes is not None:
            checks.check_routes(routes, arguments, paths.routes_dtype(arguments, chosen))
    if check_ids:
        checks.check_slots(ids, expert_map, matrices.down.values.shape[0])
    if plan is None:
        if chosen == "grouped":
            return partial(paths.run_grouped, arguments, topk_weights, out, routes)
        plan = paths.decode_plan(arguments, chosen, topk_weights is None, out)
        launch_plan.remember(key, plan)
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
    check = partial(checks.check_combine, routes, ids, topk_weights, out, dtype)
    return paths.run_combine(routes, ids, topk_weights, out, dtype, check)
