"""The two launches of a call of up to 16 tokens: grids, arguments, and which tensors they get."""

from __future__ import annotations

from typing import Any

import torch
import triton

from .decode_shared import down_shared, gate_up_shared
from .decode_vector import down_vector, gate_up_vector
from .launch import DECODE_TOKENS, config_of, form, must_upcast
from .plans import Empty, Launch, Plan
from .problem import Problem


def gate_up_values(p: Problem) -> dict[str, Any]:
    """Of a decode kernel: everything but tensors, block sizes and what its path adds."""
    stride_gs, stride_gn, stride_gh = p.gate_up.stride()
    return {
        "top_k": p.k, "H": p.H, "I": p.I, "stride_ht": p.hidden.stride(0),
        "stride_gs": stride_gs, "stride_gn": stride_gn, "stride_gh": stride_gh,
        "stride_bs": 0 if p.gate_up_bias is None else p.gate_up_bias.stride(0),
        "alpha": p.alpha, "limit": p.limit, "HAS_MAP": p.expert_map is not None, **form(p),
    }  # fmt: skip


def down_values(p: Problem, per_route: bool, out_stride: int) -> dict[str, Any]:
    stride_ds, stride_dh, stride_di = p.down.stride()
    return {
        "top_k": p.k, "H": p.H, "I": p.I, "stride_ot": out_stride,
        "stride_ds": stride_ds, "stride_dh": stride_dh, "stride_di": stride_di,
        "stride_bs": 0 if p.down_bias is None else p.down_bias.stride(0),
        "per_route": int(per_route),
        "HAS_MAP": p.expert_map is not None, "HAS_BIAS": p.down_bias is not None,
    }  # fmt: skip


def gate_up_tensors(p: Problem) -> dict[str, str]:
    """Of a decode kernel, by parameter. What a form lacks is given a tensor that it will not read,
    of a dtype that makes no second machine code."""
    return {
        "hidden_ptr": "hidden", "ids_ptr": "ids", "gate_up_ptr": "gate_up", "act_ptr": "act",
        "map_ptr": "ids" if p.expert_map is None else "expert_map",
        "bias_ptr": "gate_up" if p.gate_up_bias is None else "gate_up_bias",
    }  # fmt: skip


def down_tensors(p: Problem, per_route: bool) -> dict[str, str]:
    return {
        "act_ptr": "act", "ids_ptr": "ids", "down_ptr": "down",
        "map_ptr": "ids" if p.expert_map is None else "expert_map",
        "bias_ptr": "down" if p.down_bias is None else "down_bias",
        "weights_ptr": "routes" if per_route else "weights",
        "out_ptr": "hidden" if per_route else "out",
    }  # fmt: skip


def vector_launches(p: Problem, per_route: bool, out_stride: int) -> tuple[Launch, Launch]:
    through = p.read_through is not None
    biases_through = p.read_through is not None and p.read_through.gate_up_bias is not None
    first, second = config_of("gate_up_vector", p), config_of("down_vector", p)
    return (
        Launch(
            gate_up_vector, (p.T * p.k, triton.cdiv(p.I, first["BLOCK_I"])),
            {
                **gate_up_tensors(p),
                "source_ptr": "source_gate_up" if through else "ids",
                "bias_source_ptr": "source_gate_up_bias" if biases_through else "ids",
            },
            **gate_up_values(p), READ_THROUGH=through, ROWWISE=p.gate_up.stride(2) == 1, **first,
        ),
        Launch(
            down_vector, (p.T, triton.cdiv(p.H, second["BLOCK_H"])),
            {
                **down_tensors(p, per_route),
                "source_ptr": "source_down" if through else "ids",
                "bias_source_ptr": "source_down_bias" if biases_through else "ids",
                "routes_ptr": "routes" if per_route else "weights",
            },
            **down_values(p, per_route, out_stride), READ_THROUGH=through,
            # More lanes of routes than routes would only idle.
            **{**second, "ROUTES": min(second["ROUTES"], triton.next_power_of_2(p.k))},
        ),
    )  # fmt: skip


def shared_launches(p: Problem, per_route: bool, out_stride: int) -> tuple[Launch, Launch]:
    R = p.T * p.k
    first, second = config_of("gate_up_shared", p), config_of("down_shared", p)
    plan = {"plan_ptr": "plan", "rows_ptr": "rows"}
    upcast = must_upcast(p.hidden.dtype, p.hidden.device)
    return (
        Launch(
            gate_up_shared, (R, triton.cdiv(p.I, first["BLOCK_I"])),
            {**gate_up_tensors(p), **plan},
            **gate_up_values(p), T=p.T, TOKENS=DECODE_TOKENS, UPCAST=upcast,
            K_PAD=triton.next_power_of_2(p.k), R_PAD=triton.next_power_of_2(R), **first,
        ),
        Launch(
            down_shared, (triton.cdiv(p.H, second["BLOCK_H"]),),
            {**down_tensors(p, per_route), **plan, "routes_ptr": "routes"},
            **down_values(p, per_route, out_stride), T=p.T, TOKENS=DECODE_TOKENS, UPCAST=upcast,
            **second,
        ),
    )  # fmt: skip


def decode_plan(p: Problem, path: str, per_route: bool, out: torch.Tensor | None) -> Plan:
    """How `routes` [T, k, H] of the present routes are computed, or `out` [T, H]."""
    R = p.T * p.k
    out_stride = p.H if out is None else out.stride(0)
    scratch = [Empty("act", (R, p.I), p.hidden.dtype)]
    routes = Empty("routes", (p.T, p.k, p.H), torch.float32)
    if path == "vector":
        launches = vector_launches(p, per_route, out_stride)
    else:
        launches = shared_launches(p, per_route, out_stride)
        scratch.append(Empty("plan", (1 + 2 * R,), torch.int32))
        scratch.append(Empty("rows", (R, DECODE_TOKENS), torch.int32))
        if not per_route:
            scratch.append(routes)
    result = routes if per_route else Empty("out", (p.T, p.H), p.hidden.dtype)
    return Plan(p.hidden.device, launches, result, tuple(scratch))
