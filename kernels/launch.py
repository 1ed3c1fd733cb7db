"""From a checked problem to launches: picks the path and the block sizes, allocates, launches.

Three paths: `vector` and `shared` for up to 16 tokens, two launches each; `grouped` for more. The
choice follows from shapes, dtype and device alone, so a layer's result cannot depend on residency.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from . import tuning
from .activations import ACTIVATIONS
from .combine import combine as combine_kernel
from .decode_shared import down_shared, gate_up_shared
from .decode_vector import down_vector, gate_up_vector
from .prefill import down_grouped, gate_up_grouped
from .problem import Problem
from .tiles import plan_tiles

PATHS = ("vector", "shared", "grouped")
DECODE_TOKENS = 16
# Said aloud because Triton's default changes with its version.
FUSE = {"enable_fp_fusion": True}
INTERPRETED = isinstance(combine_kernel, InterpretedFunction)


def check_device(device: torch.device) -> None:
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"hidden: expected a CUDA device, found {device} "
            "(Triton kernels run on the CPU only under TRITON_INTERPRET=1)"
        )


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


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


def run(
    problem: Problem,
    path: str,
    *,
    weights: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    routes: torch.Tensor | None = None,
) -> None:
    """Computes `routes` [T, k, H] of the present routes, or `out` [T, H] if `routes` is None."""
    with on_device(problem.hidden.device):
        if path == "vector":
            run_vector(problem, weights, out, routes)
        elif path == "shared":
            run_shared(problem, weights, out, routes)
        else:
            run_grouped(problem, weights, out, routes)


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


def form(problem: Problem) -> dict[str, Any]:
    return {
        "HAS_BIAS": problem.gate_up_bias is not None,
        "GATED": problem.gated,
        "INTERLEAVED": problem.interleaved,
        "ACTIVATION": ACTIVATIONS.index(problem.activation),
    }


def bias_and_stride(bias: torch.Tensor | None, unused: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (unused, 0) if bias is None else (bias, bias.stride(0))


def new(problem: Problem, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=problem.hidden.device)


def run_vector(
    p: Problem,
    weights: torch.Tensor | None,
    out: torch.Tensor | None,
    routes: torch.Tensor | None,
) -> None:
    act = new(p, p.T * p.k, p.I, dtype=p.hidden.dtype)
    ids, slots_of_experts = p.ids, p.ids if p.expert_map is None else p.expert_map
    source = p.read_through
    bias, stride_bs = bias_and_stride(p.gate_up_bias, p.gate_up)
    chosen = config_of("gate_up_vector", p)
    gate_up_vector[(p.T * p.k, triton.cdiv(p.I, chosen["BLOCK_I"]))](
        p.hidden, ids, slots_of_experts, p.gate_up, bias,
        ids if source is None else source.gate_up,
        ids if source is None or source.gate_up_bias is None else source.gate_up_bias,
        act,
        p.k, p.H, p.I, p.hidden.stride(0), *p.gate_up.stride(), stride_bs, p.alpha, p.limit,
        HAS_MAP=p.expert_map is not None, READ_THROUGH=source is not None,
        ROWWISE=p.gate_up.stride(2) == 1, **form(p), **chosen, **FUSE,
    )  # fmt: skip
    bias, stride_bs = bias_and_stride(p.down_bias, p.down)
    chosen = config_of("down_vector", p)
    # More lanes of routes than routes would only idle.
    chosen = {**chosen, "ROUTES": min(chosen["ROUTES"], triton.next_power_of_2(p.k))}
    per_route = routes is not None
    down_vector[(p.T, triton.cdiv(p.H, chosen["BLOCK_H"]))](
        act, ids, slots_of_experts, act if weights is None else weights, p.down, bias,
        ids if source is None else source.down,
        ids if source is None or source.down_bias is None else source.down_bias,
        act if routes is None else routes, p.hidden if out is None else out,
        p.k, p.H, p.I, *p.down.stride(), stride_bs, 0 if out is None else out.stride(0),
        int(per_route),
        HAS_MAP=p.expert_map is not None, HAS_BIAS=p.down_bias is not None,
        READ_THROUGH=source is not None, **chosen, **FUSE,
    )  # fmt: skip


def run_shared(
    p: Problem,
    weights: torch.Tensor | None,
    out: torch.Tensor | None,
    routes: torch.Tensor | None,
) -> None:
    R = p.T * p.k
    act = new(p, R, p.I, dtype=p.hidden.dtype)
    plan = new(p, 1 + 2 * R, dtype=torch.int32)
    rows = new(p, R, DECODE_TOKENS, dtype=torch.int32)
    per_route = routes is not None
    if routes is None:
        routes = new(p, R, p.H, dtype=torch.float32)
    slots_of_experts = p.ids if p.expert_map is None else p.expert_map
    upcast = must_upcast(p.hidden.dtype, p.hidden.device)
    bias, stride_bs = bias_and_stride(p.gate_up_bias, p.gate_up)
    chosen = config_of("gate_up_shared", p)
    gate_up_shared[(R, triton.cdiv(p.I, chosen["BLOCK_I"]))](
        p.hidden, p.ids, slots_of_experts, p.gate_up, bias, act, plan, rows,
        p.T, p.k, p.H, p.I, p.hidden.stride(0), *p.gate_up.stride(), stride_bs, p.alpha, p.limit,
        HAS_MAP=p.expert_map is not None, UPCAST=upcast, TOKENS=DECODE_TOKENS,
        K_PAD=triton.next_power_of_2(p.k), R_PAD=triton.next_power_of_2(R),
        **form(p), **chosen, **FUSE,
    )  # fmt: skip
    bias, stride_bs = bias_and_stride(p.down_bias, p.down)
    chosen = config_of("down_shared", p)
    down_shared[(triton.cdiv(p.H, chosen["BLOCK_H"]),)](
        act, p.ids, slots_of_experts, act if weights is None else weights, p.down, bias,
        plan, rows, routes, p.hidden if out is None else out,
        p.T, p.k, p.H, p.I, *p.down.stride(), stride_bs, 0 if out is None else out.stride(0),
        int(per_route),
        HAS_MAP=p.expert_map is not None, HAS_BIAS=p.down_bias is not None, UPCAST=upcast,
        TOKENS=DECODE_TOKENS, **chosen, **FUSE,
    )  # fmt: skip


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
) -> None:
    R = p.T * p.k
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
    act = new(p, R, p.I, dtype=p.hidden.dtype)
    upcast = must_upcast(p.hidden.dtype, p.hidden.device)
    bias, stride_bs = bias_and_stride(p.gate_up_bias, p.gate_up)
    gate_up_grouped[(count * triton.cdiv(p.I, first["BLOCK_I"]),)](
        p.hidden, p.gate_up, bias, act, tiles.order, tiles.slot, tiles.first, tiles.end,
        count, p.k, p.H, p.I, p.hidden.stride(0), *p.gate_up.stride(), stride_bs, p.alpha, p.limit,
        UPCAST=upcast, **form(p), **first, **FUSE,
    )  # fmt: skip
    every = new(p, p.T, p.k, p.H, dtype=p.hidden.dtype) if routes is None else routes
    bias, stride_bs = bias_and_stride(p.down_bias, p.down)
    down_grouped[(count * triton.cdiv(p.H, second["BLOCK_H"]),)](
        act, p.down, bias, every, tiles.order, tiles.slot, tiles.first, tiles.end,
        count, p.H, p.I, *p.down.stride(), stride_bs,
        HAS_BIAS=p.down_bias is not None, UPCAST=upcast, **second, **FUSE,
    )  # fmt: skip
    if routes is None and weights is not None and out is not None:
        run_combine(every, slots, weights, out)


def run_combine(
    routes: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
) -> None:
    T, k, H = routes.shape
    with on_device(routes.device):
        combine_kernel[(T, triton.cdiv(H, 512))](
            routes, ids, weights, out, k, H, out.stride(0), BLOCK_H=512, num_warps=4, **FUSE
        )
