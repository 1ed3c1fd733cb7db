"""From a checked problem to launches: picks the path and the block sizes.

Three paths: `vector` and `shared` for up to 16 tokens, two launches each, planned once per
signature; `grouped` for more, whose tiles follow from the ids of every call. The choice follows
from shapes, dtype and device alone, so a layer's result cannot depend on residency.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from . import plans, tuning
from .activations import ACTIVATIONS
from .combine import combine as combine_kernel
from .plans import FUSE, Empty, Launch, Plan, on_device
from .prefill import down_grouped, gate_up_grouped
from .problem import Problem
from .tiles import plan_tiles

PATHS = ("vector", "shared", "grouped")
DECODE_TOKENS = 16
INTERPRETED = isinstance(combine_kernel, InterpretedFunction)


def check_device(device: torch.device) -> None:
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"hidden: expected a CUDA device, found {device} "
            "(Triton kernels run on the CPU only under TRITON_INTERPRET=1)"
        )


def has_tensor_cores_for(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Triton multiplies this dtype on tensor cores; Turing's it compiles to plain FMA."""
    if dtype == torch.float32:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def must_upcast(dtype: torch.dtype, device: torch.device) -> bool:
    # Interpreters before Triton 3.7 multiply the bit patterns of bfloat16.
    return not has_tensor_cores_for(dtype, device) or (INTERPRETED and dtype == torch.bfloat16)


def pick_path(problem: Problem) -> str:
    if problem.T > DECODE_TOKENS:
        return "grouped"
    if problem.T == 1 or not has_tensor_cores_for(problem.hidden.dtype, problem.hidden.device):
        return "vector"
    return "shared"


def check_path(problem: Problem, path: str | None) -> str:
    """The named path if it can serve the problem, the default one for None."""
    if path is None:
        return pick_path(problem)
    if path not in PATHS:
        raise ValueError(f"path: expected one of {PATHS}, found {path!r}")
    if path != "grouped" and problem.T > DECODE_TOKENS:
        raise ValueError(
            f"path {path!r}: expected at most {DECODE_TOKENS} tokens, found {problem.T}"
        )
    if problem.read_through is not None and path != "vector":
        raise ValueError(f"read_through: expected path 'vector', found {path!r}")
    return path


def routes_dtype(problem: Problem, path: str) -> torch.dtype:
    """Decode keeps one expert's output in float32; prefill writes it in the weights' dtype."""
    return problem.hidden.dtype if path == "grouped" else torch.float32


def question(kernel: str, problem: Problem, rows_per_tile: int = 0) -> dict[str, Any]:
    """What the tuning table is asked for this kernel."""
    weights = problem.gate_up if kernel.startswith("gate_up") else problem.down
    return {
        "dtype": str(problem.hidden.dtype).removeprefix("torch."),
        "hidden": problem.H,
        "intermediate": problem.I,
        "order": "rows" if weights.stride(2) == 1 else "columns",
        "rows_per_tile": rows_per_tile,
    }


def config_of(kernel: str, problem: Problem, rows_per_tile: int = 0) -> Mapping[str, int]:
    devices = tuning.device_names(problem.hidden.device)
    return tuning.config(kernel, devices, **question(kernel, problem, rows_per_tile))


def form(p: Problem) -> dict[str, Any]:
    return {
        "HAS_BIAS": p.gate_up_bias is not None,
        "GATED": p.gated,
        "INTERLEAVED": p.interleaved,
        "ACTIVATION": ACTIVATIONS.index(p.activation),
    }


def rows_per_tile(p: Problem) -> int:
    """BLOCK_M for the mean number of rows per expert; never a function of the number of slots."""
    experts = p.num_experts
    if experts is None:
        experts = 64 if p.expert_map is None else p.expert_map.numel()
    mean = p.T * p.k / experts
    return next((rows for rows in (16, 32, 64) if mean <= rows), 128)


def run_grouped(
    p: Problem,
    weights: torch.Tensor | None,
    out: torch.Tensor | None,
    routes: torch.Tensor | None,
) -> torch.Tensor:
    """Returns `routes` [T, k, H] of the present routes, or `out` [T, H] where there are weights."""
    rows = rows_per_tile(p)
    first, second = (config_of(name, p, rows) for name in ("gate_up_grouped", "down_grouped"))
    if first["BLOCK_M"] != second["BLOCK_M"]:
        raise LookupError(f"{tuning.TABLE.name}: BLOCK_M differs between {first} and {second}")
    ids = p.ids.reshape(-1).long()
    slots = ids
    if p.expert_map is not None:
        slots = torch.where(ids < 0, -1, p.expert_map.long()[ids.clamp(min=0)])
    tiles = plan_tiles(slots, p.S, first["BLOCK_M"])
    count = tiles.slot.numel()
    act = p.hidden.new_empty(p.T * p.k, p.I)
    every = p.hidden.new_empty(p.T, p.k, p.H) if routes is None else routes
    upcast = must_upcast(p.hidden.dtype, p.hidden.device)
    bias, stride_bs = bias_or(p.gate_up, p.gate_up_bias)
    with on_device(p.hidden.device):
        gate_up_grouped[(count * triton.cdiv(p.I, first["BLOCK_I"]),)](
            p.hidden, p.gate_up, bias, act, tiles.order, tiles.slot, tiles.first, tiles.end,
            count, p.k, p.H, p.I, p.hidden.stride(0), *p.gate_up.stride(), stride_bs,
            p.alpha, p.limit, UPCAST=upcast, **form(p), **first, **FUSE,
        )  # fmt: skip
        bias, stride_bs = bias_or(p.down, p.down_bias)
        down_grouped[(count * triton.cdiv(p.H, second["BLOCK_H"]),)](
            act, p.down, bias, every, tiles.order, tiles.slot, tiles.first, tiles.end,
            count, p.H, p.I, *p.down.stride(), stride_bs,
            HAS_BIAS=p.down_bias is not None, UPCAST=upcast, **second, **FUSE,
        )  # fmt: skip
    if weights is None:
        return every
    return run_combine(every, slots, weights, out, p.hidden.dtype)


def bias_or(unread: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    return (unread, 0) if bias is None else (bias, bias.stride(0))


def run_combine(
    routes: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor | None,
    dtype: torch.dtype,
    check: Callable[[], None] | None = None,
) -> torch.Tensor:
    """`check` is called where no call of this signature was checked before."""
    tensors = plans.places(routes=routes, ids=ids, weights=weights, out=out)
    parts, addresses = plans.signature(tensors)
    key = (parts, dtype)
    plan = plans.PLANS.get(key)
    if plan is None:
        if check is not None:
            check()
        T, k, H = routes.shape
        only = Launch(
            combine_kernel, (T, triton.cdiv(H, 512)),
            {"routes_ptr": "routes", "ids_ptr": "ids", "weights_ptr": "weights", "out_ptr": "out"},
            top_k=k, H=H, stride_ot=H if out is None else out.stride(0), BLOCK_H=512, num_warps=4,
        )  # fmt: skip
        plan = plans.keep(key, Plan(routes.device, (only,), Empty("out", (T, H), dtype)))
    return plan.prepare(tensors, addresses)()
