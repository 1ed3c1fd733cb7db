"""From checked arguments to launches: the path, the block sizes, and each kernel's arguments.

Three paths: `vector` and `shared` for up to 16 tokens, two launches each, planned once per
signature; `grouped` for more, whose tiles follow from the ids of every call. The choice follows
from shapes, dtype and device alone, so a layer's result cannot depend on residency.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton

from . import launch_plan, tuning
from .checks import INTERPRETED, Arguments
from .decode_shared import down_shared, gate_up_shared
from .decode_vector import down_vector, gate_up_vector
from .formats import FORMATS, SCALE_TYPES, folds, tuned_as
from .forms import Matrix
from .launch_plan import FUSE, MATRICES, Launch, LaunchPlan, Scratch, on_device
from .prefill import down_grouped, gate_up_grouped
from .route_sum import sum_routes
from .tiles import make_tiles

PATHS = ("vector", "shared", "grouped")
DECODE_TOKENS = 16
# Where gate and up both have a multiplier, or a bias, its strides are the same.
OF_BOTH = ("stride_ms", "stride_bs", "stride_bn")


def has_tensor_cores_for(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Triton multiplies this dtype on tensor cores; Turing's it compiles to plain FMA."""
    if dtype == torch.float32:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def must_upcast(matrix: Matrix, dtype: torch.dtype, device: torch.device) -> bool:
    # Interpreters before Triton 3.7 multiply the bit patterns of bfloat16. The range of float16 is
    # too small for sums without their scales.
    return (
        not has_tensor_cores_for(dtype, device)
        or (INTERPRETED and dtype == torch.bfloat16)
        or (is_scaled(matrix) and dtype == torch.float16)
    )


def is_scaled(matrix: Matrix) -> bool:
    return matrix.scales is not None or FORMATS[matrix.format].unit > 1


def pick_path(a: Arguments) -> str:
    if a.T > DECODE_TOKENS:
        return "grouped"
    if a.T == 1 or not has_tensor_cores_for(a.dtype, a.device):
        return "vector"
    return "shared"


def check_path(a: Arguments, path: str | None) -> str:
    """The named path if it can serve the call, the default one for None."""
    if path is None:
        return pick_path(a)
    if path not in PATHS:
        raise ValueError(f"path: expected one of {PATHS}, found {path!r}")
    if path != "grouped" and a.T > DECODE_TOKENS:
        raise ValueError(f"path {path!r}: expected at most {DECODE_TOKENS} tokens, found {a.T}")
    return path


def routes_dtype(a: Arguments, path: str) -> torch.dtype:
    """Decode keeps one expert's output in float32; prefill writes it in the tokens' dtype."""
    return a.dtype if path == "grouped" else torch.float32


def matrices_of(kernel: str, a: Arguments) -> tuple[Matrix, ...]:
    """The matrices that a kernel multiplies; gate alone where up is stored as gate is."""
    if not kernel.startswith("gate_up"):
        return (a.matrices.down,)
    gate, up = a.matrices.gate, a.matrices.up
    return (gate,) if up is None or a.matrices.up_is_as_gate else (gate, up)


def tuning_key(
    kernel: str, a: Arguments, rows_per_tile: int = 0, matrix: Matrix | None = None
) -> dict[str, Any]:
    """What the tuning table is asked for this kernel, of one of its matrices or of the first."""
    every = matrices_of(kernel, a)
    matrix = matrix or every[0]
    # Tiles of blocks in float32 need more registers: all but those of gate_up_vector are smaller,
    # and those of down_vector only where blocks have scales. Both products of a prefill have tiles
    # of the same rows.
    multiplied = prefill_matrices(a) if kernel.endswith("grouped") else every
    in_floats = kernel != "gate_up_vector" and any(
        (FORMATS[each.format].group and kernel == "down_vector")
        or (FORMATS[each.format].unit > 1 and must_upcast(each, a.dtype, a.device))
        for each in multiplied
    )
    return {
        "dtype": "float32" if in_floats else str(a.dtype).removeprefix("torch."),
        "hidden": a.H,
        "intermediate": a.I,
        "order": "rows" if matrix.values.stride(2) == 1 else "columns",
        "weights": "plain" if matrix.values.dtype == a.dtype else tuned_as(matrix.format),
        "rows_per_tile": rows_per_tile,
    }


def config_of(kernel: str, a: Arguments, rows_per_tile: int = 0) -> Mapping[str, Any]:
    every, devices = matrices_of(kernel, a), tuning.device_names(a.device)
    config = min(
        (tuning.config(kernel, devices, **tuning_key(kernel, a, rows_per_tile, m)) for m in every),
        key=lambda one: one["BLOCK_H"] * one["BLOCK_I"],
    )
    summed = "BLOCK_H" if kernel.startswith("gate_up") else "BLOCK_I"
    for matrix in every:
        cols = matrix.block[1] if matrix.block else 0
        if not must_upcast(matrix, a.dtype, a.device):
            cols = cols or FORMATS[matrix.format].group
        # Scales that multiply the sums of a tile are the same for all of its columns.
        multiplies_sums = not kernel.endswith("vector") and not folds(
            matrix.format, matrix.scales, a.dtype
        )
        if cols and multiplies_sums and cols < config[summed]:
            config = {**config, summed: cols}
    return config


def scale_type(matrix: Matrix) -> str | None:
    row = FORMATS[matrix.format]
    if row.unit > 1:
        return "blocks" if row.group else "palette"
    return None if matrix.scales is None else SCALE_TYPES[matrix.scales.dtype]


def matrix_values(matrix: Matrix) -> dict[str, Any]:
    """Its format and scales, and the strides of each tensor: None for those it has not."""

    def strides(tensor: torch.Tensor | None, *names: str) -> dict[str, int | None]:
        if tensor is None:
            return dict.fromkeys(names)
        return dict(zip(names, (*tensor.stride(), 0, 0), strict=False))

    return {
        **strides(matrix.values, "stride_ws", "stride_wn", "stride_wk"),
        **strides(matrix.scales, "stride_cs", "stride_cn", "stride_ck"),
        **strides(matrix.multiplier, "stride_ms"),
        **strides(matrix.bias, "stride_bs", "stride_bn"),
        "FORMAT": matrix.format,
        "SCALE_TYPE": scale_type(matrix),
        "SCALE_N": matrix.block[0] if matrix.block else 1,
        "SCALE_K": matrix.block[1] if matrix.block else 0,
    }


def product_values(matrix: Matrix, a: Arguments) -> dict[str, Any]:
    """How a kernel for the tensor cores multiplies this matrix."""
    return {
        "FOLD": folds(matrix.format, matrix.scales, a.dtype),
        "UPCAST": must_upcast(matrix, a.dtype, a.device),
    }


def gate_up_values(a: Arguments, multiply: bool = True) -> dict[str, Any]:
    """Everything but tensors, block sizes and what a path adds. `multiply`: on tensor cores."""
    gate = a.form.gate
    of_gate, *of_up = (
        {**matrix_values(matrix), **(product_values(matrix, a) if multiply else {})}
        for matrix in matrices_of("gate_up", a)
    )
    other = {
        name.replace("stride_", "stride_up_") if name.startswith("stride_") else f"UP_{name}": (
            of_up[0][name] if of_up else None
        )
        for name in of_gate
        if name not in OF_BOTH
    }
    if of_up and of_gate["stride_ms"] is None:
        of_gate["stride_ms"] = of_up[0]["stride_ms"]
    return {
        "top_k": a.k, "H": a.H, "I": a.I, "stride_ht": a.hidden.stride(0),
        "alpha": gate.alpha, "limit": gate.limit,
        "FUNCTION": gate.function, "ACTIVATION": gate.activation, **of_gate, **other,
    }  # fmt: skip


def down_values(a: Arguments, per_route: bool, out_stride: int) -> dict[str, Any]:
    return {
        "top_k": a.k, "H": a.H, "I": a.I, "stride_ot": out_stride, "per_route": int(per_route),
        **matrix_values(a.matrices.down),
    }  # fmt: skip


def vector_launches(a: Arguments, per_route: bool, out_stride: int) -> tuple[Launch, Launch]:
    first, second = config_of("gate_up_vector", a), {**config_of("down_vector", a)}
    # More lanes of routes than routes would only idle.
    second["ROUTES"] = min(second["ROUTES"], triton.next_power_of_2(a.k))
    # What a launch does not read is given another tensor of the same dtype, and not None, which
    # would be a second machine code.
    unread = {"weights": "routes", "out": "hidden"} if per_route else {"routes": "weights"}
    return (
        Launch(
            gate_up_vector, (a.T * a.k, triton.cdiv(a.I, first["BLOCK_I"])),
            **gate_up_values(a, multiply=False),
            ROWWISE=a.matrices.gate.values.stride(2) == 1, **first,
        ),
        Launch(
            down_vector, (a.T, triton.cdiv(a.H, second["BLOCK_H"])), unread,
            **down_values(a, per_route, out_stride), **second,
        ),
    )  # fmt: skip


def shared_launches(a: Arguments, per_route: bool, out_stride: int) -> tuple[Launch, Launch]:
    R = a.T * a.k
    first, second = config_of("gate_up_shared", a), config_of("down_shared", a)
    common: dict[str, Any] = {
        "T": a.T,
        "TOKENS": DECODE_TOKENS,
    }
    unread = {"weights": "routes", "out": "hidden"} if per_route else {}
    return (
        Launch(
            gate_up_shared, (R, triton.cdiv(a.I, first["BLOCK_I"])), **gate_up_values(a), **common,
            K_PAD=triton.next_power_of_2(a.k), R_PAD=triton.next_power_of_2(R), **first,
        ),
        Launch(
            down_shared, (triton.cdiv(a.H, second["BLOCK_H"]),), unread,
            **down_values(a, per_route, out_stride), **common,
            **product_values(a.matrices.down, a), **second,
        ),
    )  # fmt: skip


def decode_plan(a: Arguments, path: str, per_route: bool, out: torch.Tensor | None) -> LaunchPlan:
    """How `routes` [T, k, H] of the present routes are computed, or `out` [T, H]."""
    R = a.T * a.k
    out_stride = a.H if out is None else out.stride(0)
    scratch = [Scratch("act", (R, a.I), a.dtype)]
    routes = Scratch("routes", (a.T, a.k, a.H), torch.float32)
    if path == "vector":
        launches = vector_launches(a, per_route, out_stride)
    else:
        launches = shared_launches(a, per_route, out_stride)
        scratch.append(Scratch("groups", (1 + 2 * R,), torch.int32))
        scratch.append(Scratch("rows", (R, DECODE_TOKENS), torch.int32))
        if not per_route:
            scratch.append(routes)
    result = routes if per_route else Scratch("out", (a.T, a.H), a.dtype)
    return LaunchPlan(a.device, launches, result, tuple(scratch))


def rows_per_tile(a: Arguments) -> int:
    """BLOCK_M for the mean number of rows per expert; never a function of the number of slots.

    Scaled formats keep a second tile of sums, for which tiles of 128 rows have no registers.
    Blocks with scales, zero points, and gate and up of two formats need more yet: those of 64 have
    none.
    """
    experts = a.num_experts
    if experts is None:
        experts = 64 if a.expert_map is None else a.expert_map.numel()
    mean = a.T * a.k / experts
    every = prefill_matrices(a)
    rows = [FORMATS[matrix.format] for matrix in every]
    most = 64 if any(row.scaled for row in rows) else 128
    more = any(row.group for row in rows) or any(matrix.zeros is not None for matrix in every)
    if more or len(every) > 2:
        most = 32
    return min(next((count for count in (16, 32, 64) if mean <= count), most), most)


def prefill_matrices(a: Arguments) -> tuple[Matrix, ...]:
    return (*matrices_of("gate_up_grouped", a), a.matrices.down)


def run_grouped(
    a: Arguments,
    weights: torch.Tensor | None,
    out: torch.Tensor | None,
    routes: torch.Tensor | None,
) -> torch.Tensor:
    """Returns `routes` [T, k, H] of the present routes, or `out` [T, H] where there are weights."""
    rows = rows_per_tile(a)
    first, second = (config_of(name, a, rows) for name in ("gate_up_grouped", "down_grouped"))
    if first["BLOCK_M"] != second["BLOCK_M"]:
        raise LookupError(f"{tuning.TABLE.name}: BLOCK_M differs between {first} and {second}")
    with on_device(a.device):
        tiles = make_tiles(a.ids, a.expert_map, a.S, first["BLOCK_M"])
    count = tiles.slot.numel()
    act = a.hidden.new_empty(a.T * a.k, a.I)
    every = a.hidden.new_empty(a.T, a.k, a.H) if routes is None else routes
    pointers = {f"{name}_ptr": t for name, t in zip(MATRICES, a.matrices.tensors, strict=True)}
    down = {name: pointers.pop(name) for name in tuple(pointers) if name.startswith("down")}
    common = {
        "order_ptr": tiles.order, "slot_ptr": tiles.slot, "first_ptr": tiles.first,
        "end_ptr": tiles.end, "tiles": count, **FUSE,
    }  # fmt: skip
    with on_device(a.device):
        gate_up_grouped[(count * triton.cdiv(a.I, first["BLOCK_I"]),)](
            hidden_ptr=a.hidden, act_ptr=act, **pointers, **gate_up_values(a), **common, **first,
        )  # fmt: skip
        down_grouped[(count * triton.cdiv(a.H, second["BLOCK_H"]),)](
            act_ptr=act, routes_ptr=every, **down, H=a.H, I=a.I, **matrix_values(a.matrices.down),
            **product_values(a.matrices.down, a), **common, **second,
        )  # fmt: skip
    if weights is None:
        return every
    return run_combine(every, tiles.keys.view_as(a.ids), weights, out, a.dtype)


def run_combine(
    routes: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor | None,
    dtype: torch.dtype,
    check: Any = None,
) -> torch.Tensor:
    """`check` is called where no call of this signature was checked before."""
    tensors = [None, ids, weights, None, out, routes]
    parts, addresses = launch_plan.signature(tensors)
    key = (parts, dtype)
    plan = launch_plan.PLANS.get(key)
    if plan is None:
        if check is not None:
            check()
        T, k, H = routes.shape
        only = Launch(
            sum_routes, (T, triton.cdiv(H, 512)),
            top_k=k, H=H, stride_ot=H if out is None else out.stride(0), BLOCK_H=512, num_warps=4,
        )  # fmt: skip
        plan = LaunchPlan(routes.device, (only,), Scratch("out", (T, H), dtype))
        launch_plan.remember(key, plan)
    return plan.prepare(tensors, addresses)()
