"""What a call asks for, checked: shapes, strides, dtypes, devices, forms and ids.

Every check of this room is here, and all run before any launch. Errors say what was expected and
what was found. Only the check of the ids reads the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.runtime.interpreter import InterpretedFunction

from .formats import FORMATS, SCALE_TYPES, Format
from .forms import ExpertForm, ExpertMatrices, Matrix
from .gates import check_form
from .route_sum import sum_routes

MAX_TOP_K = 32
ID_DTYPES = (torch.int32, torch.int64)
INTERPRETED = isinstance(sum_routes, InterpretedFunction)


@dataclass(frozen=True)
class Arguments:
    """One MoE layer's call, checked. T tokens, k routes each, S slots, H hidden, I intermediate."""

    hidden: torch.Tensor
    ids: torch.Tensor
    matrices: ExpertMatrices
    form: ExpertForm
    expert_map: torch.Tensor | None
    num_experts: int | None
    T: int
    k: int
    S: int
    H: int
    I: int  # noqa: E741 - the name of this index in every kernel

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device


def check_arguments(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    matrices: ExpertMatrices,
    form: ExpertForm,
    expert_map: torch.Tensor | None,
    num_experts: int | None,
) -> Arguments:
    """All but the values of the ids; raises ValueError or TypeError."""
    check_form(form)
    gate, up, down = matrices.gate, matrices.up, matrices.down
    if (up is not None) != form.has_gate:
        found = "None" if up is None else "a matrix"
        raise ValueError(f"up: expected has_gate={form.has_gate} to agree, found {found}")
    for name, tensor, ndim in (
        ("hidden", hidden, 2), ("ids", ids, 2), ("gate", gate.values, 3), ("down", down.values, 3),
    ):  # fmt: skip
        if tensor.ndim != ndim:
            raise ValueError(
                f"{name}: expected {ndim} dimensions, found shape {tuple(tensor.shape)}"
            )
    (T, H), k, (S, _, stored) = hidden.shape, ids.shape[1], down.values.shape
    row = FORMATS.get(down.format)
    I = stored if row is None else row.cols(stored)  # noqa: E741
    if T == 0:
        raise ValueError("hidden: expected at least 1 token, found 0")
    if not 1 <= k <= MAX_TOP_K:
        raise ValueError(f"ids: expected 1 to {MAX_TOP_K} routes per token, found {k}")
    if num_experts is not None and num_experts < 1:
        raise ValueError(f"num_experts: expected at least 1, found {num_experts}")
    if min(S, H, I) == 0:
        raise ValueError(f"down: expected no empty dimension, found {tuple(down.values.shape)}")

    check_unit_stride("hidden", hidden)
    check_ids_tensor("ids", ids, (T, k), hidden.device)
    check_matrix("gate", gate, (S, I, H), form.has_bias, hidden)
    check_matrix("down", down, (S, H, I), form.has_bias, hidden)
    if up is not None:
        check_matrix("up", up, (S, I, H), form.has_bias, hidden)
        check_alike(gate, up)
    if expert_map is not None:
        if expert_map.ndim != 1 or expert_map.numel() == 0:
            raise ValueError(f"expert_map: expected [E], found {tuple(expert_map.shape)}")
        check_ids_tensor("expert_map", expert_map, tuple(expert_map.shape), hidden.device)
    if topk_weights is not None:
        check_weights(topk_weights, ids)
    return Arguments(hidden, ids, matrices, form, expert_map, num_experts, T, k, S, H, I)


def check_matrix(
    name: str, matrix: Matrix, shape: tuple[int, ...], has_bias: bool, hidden: torch.Tensor
) -> None:
    if matrix.format not in FORMATS:
        raise ValueError(
            f"{name}: expected a weight format of {', '.join(FORMATS)}, found {matrix.format!r}"
        )
    row = FORMATS[matrix.format]
    slots, rows, cols = shape
    check_dtype("hidden", hidden, row.tokens)
    if cols % row.pack:
        raise ValueError(f"{name}: expected a multiple of {row.pack} columns, found {cols}")
    stored = (slots, rows, row.stored(cols))
    check_tensor(name, matrix.values, stored, (row.values,), hidden.device)
    if row.unit > 1:
        check_places(name, matrix.values, 4 if row.tail else row.unit & -row.unit)
    for kind, tensor in (("scales", matrix.scales), ("multiplier", matrix.multiplier)):
        if tensor is not None and not row.scaled:
            raise ValueError(
                f"{name} {kind}: expected None for {matrix.format}, found {tuple(tensor.shape)}"
            )
    if (matrix.scales is None) != (matrix.block is None):
        wanted = "None" if matrix.block is None else f"some for blocks {matrix.block}"
        given = "None" if matrix.scales is None else tuple(matrix.scales.shape)
        raise ValueError(f"{name} scales: expected {wanted}, found {given}")
    if matrix.scales is not None and matrix.block is not None:
        check_block(name, matrix.block)
        high, wide = matrix.block[0], matrix.block[1] or cols
        grid = (slots, -(-rows // high), -(-cols // wide))
        check_tensor(f"{name} scales", matrix.scales, grid, tuple(SCALE_TYPES), hidden.device)
        if matrix.zeros is not None:
            check_zeros(name, matrix.zeros, matrix.scales, row)
    if matrix.zeros is not None and matrix.scales is None:
        raise ValueError(f"{name} zeros: expected scales to go with them, found None")
    if matrix.multiplier is not None:
        check_tensor(
            f"{name} multiplier", matrix.multiplier, (slots,), (torch.float32,), hidden.device
        )
    if (matrix.bias is not None) != has_bias:
        found = "None" if matrix.bias is None else "a bias"
        raise ValueError(f"{name} bias: expected has_bias={has_bias} to agree, found {found}")
    if matrix.bias is not None:
        dtypes = tuple(dict.fromkeys((hidden.dtype, torch.float32)))
        check_tensor(f"{name} bias", matrix.bias, shape[:2], dtypes, hidden.device)


def check_places(name: str, blocks: torch.Tensor, whole: int) -> None:
    """Blocks and tails are read in words, which begin at multiples of `whole` bytes."""
    check_unit_stride(name, blocks)
    address, strides = blocks.data_ptr(), blocks.stride()[:-1]
    if any(place % whole for place in (address, *strides)):
        raise ValueError(
            f"{name}: expected blocks at multiples of {whole} bytes, found them at {address} with "
            f"strides {strides}"
        )


def check_zeros(name: str, zeros: torch.Tensor, scales: torch.Tensor, row: Format) -> None:
    """The kernels walk zero points with the strides of the scales."""
    if not row.zeros:
        raise ValueError(f"{name} zeros: expected None for floats, found {tuple(zeros.shape)}")
    check_tensor(f"{name} zeros", zeros, tuple(scales.shape), (torch.int8,), scales.device)
    slot, *rest = scales.stride()
    expected = slot * scales.element_size(), *rest
    places = zip(zeros.shape, zeros.stride(), expected, strict=True)
    if any(size > 1 and found != wanted for size, found, wanted in places):
        raise ValueError(f"{name} zeros: expected strides {expected}, found {zeros.stride()}")


def check_block(name: str, block: tuple[int, int]) -> None:
    """A tile of columns must be whole blocks, or lie in one."""
    rows, cols = block
    if rows < 1 or (cols != 0 and (cols < 16 or cols & (cols - 1))):
        raise ValueError(
            f"{name} scales: expected blocks of 1 row or more and of a power of two of at least 16 "
            f"columns, or of all (0), found {block}"
        )


def check_alike(gate: Matrix, up: Matrix) -> None:
    """The kernels walk the multipliers of both, and the biases, with the strides of one."""
    for name, one, other in (
        ("up multiplier", gate.multiplier, up.multiplier),
        ("up bias", gate.bias, up.bias),
    ):
        if one is None or other is None:
            continue
        check_dtype(name, other, (one.dtype,))
        if one.stride() != other.stride():
            raise ValueError(
                f"{name}: expected the strides of gate, {one.stride()}, found {other.stride()}"
            )


def check_weights(weights: torch.Tensor, ids: torch.Tensor) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    check_tensor("topk_weights", weights, tuple(ids.shape), dtypes, ids.device)
    check_contiguous("topk_weights", weights)


def check_out(
    out: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    check_tensor("out", out, shape, (dtype,), device)
    check_unit_stride("out", out)


def check_routes(routes: torch.Tensor, a: Arguments, dtype: torch.dtype) -> None:
    check_tensor("routes", routes, (a.T, a.k, a.H), (dtype,), a.device)
    check_contiguous("routes", routes)


def check_combine(
    routes: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    check_device(routes.device)
    if routes.ndim != 3 or routes.numel() == 0:
        raise ValueError(f"routes: expected [T, k, H], found {tuple(routes.shape)}")
    check_contiguous("routes", routes)
    T, k, H = routes.shape
    check_ids_tensor("ids", ids, (T, k), routes.device)
    check_weights(weights, ids)
    if out is not None:
        check_out(out, (T, H), dtype, routes.device)


def check_slots(ids: torch.Tensor, expert_map: torch.Tensor | None, slots: int) -> None:
    """Every id is -1 or names a slot (or, with a map, an expert whose entry does)."""
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "ids cannot be checked while a CUDA graph is captured: pass check_ids=False"
        )
    if expert_map is None:
        check_range("ids", ids, slots)
    else:
        check_range("expert ids", ids, expert_map.numel())
        check_range("expert_map", expert_map, slots)


def check_range(name: str, ids: torch.Tensor, count: int) -> None:
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < -1 or high >= count:
        found = low if low < -1 else high
        raise ValueError(f"{name}: expected -1 or 0 to {count - 1}, found {found}")


def check_device(device: torch.device) -> None:
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"hidden: expected a CUDA device, found {device} "
            "(Triton kernels run on the CPU only under TRITON_INTERPRET=1)"
        )


def check_ids_tensor(
    name: str, ids: torch.Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    check_tensor(name, ids, shape, ID_DTYPES, device)
    check_contiguous(name, ids)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {tuple(tensor.shape)}")
    check_dtype(name, tensor, dtypes)
    if tensor.device != device:
        raise ValueError(f"{name}: expected {device}, found {tensor.device}")


def check_dtype(name: str, tensor: torch.Tensor, expected: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in expected:
        wanted = " or ".join(map(str, expected))
        raise TypeError(f"{name}: expected {wanted}, found {tensor.dtype}")


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, found strides {tensor.stride()}")


def check_unit_stride(name: str, tensor: torch.Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: expected unit stride along rows, found {tensor.stride()}")
