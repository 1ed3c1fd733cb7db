"""What a call asks for, checked: shapes, strides, dtypes, devices and ids, before any launch.

`Problem.of` is called first by everything in `experts.py`. It launches nothing; only the check of
the ids reads the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .activations import ACTIVATIONS

MAX_TOP_K = 32
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ID_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class ReadThrough:
    """Where missed experts of one token are read from, per route j; 0 means "from its slot".

    Each tensor is [k] int64 on the device of the tokens and holds addresses that the device can
    read: its own memory, or pinned host memory by its mapped address. A segment there has the inner
    strides of its slot view and is 16-byte aligned; the kernels copy it into the route's slot as
    they compute with it. The bias addresses are needed where the expert has biases.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """One MoE layer's call. T tokens, k routes each, S slots, H hidden, I intermediate.

    `gate_up` is [S, N, H] and `down` [S, H, I] whatever the checkpoint's order was, with N = 2I if
    gated and I if not; transposed weights appear here as transposed views.
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    expert_map: torch.Tensor | None
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    read_through: ReadThrough | None
    activation: str
    gated: bool
    interleaved: bool
    transposed: bool
    alpha: float
    limit: float
    num_experts: int | None
    T: int
    k: int
    S: int
    H: int
    I: int  # noqa: E741 - the name of this index in every kernel

    @classmethod
    def of(
        cls,
        hidden: torch.Tensor,
        ids: torch.Tensor,
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
    ) -> Problem:
        """Checks everything; raises ValueError or TypeError with what was expected and found."""
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {ACTIVATIONS}, found {activation!r}")
        if activation == "swiglu_clamped" and not gated:
            raise ValueError("activation 'swiglu_clamped' is a gate: expected gated=True")
        if interleaved and not gated:
            raise ValueError("interleaved=True needs gate and up: expected gated=True")
        for name, tensor, ndim in (
            ("hidden", hidden, 2), ("slot_ids", ids, 2), ("gate_up", gate_up, 3), ("down", down, 3),
        ):  # fmt: skip
            if tensor.ndim != ndim:
                raise ValueError(
                    f"{name}: expected {ndim} dimensions, found shape {tuple(tensor.shape)}"
                )
        if transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        (T, H), k, S, I = hidden.shape, ids.shape[1], down.shape[0], down.shape[2]  # noqa: E741
        N = 2 * I if gated else I
        if T == 0:
            raise ValueError("hidden: expected at least 1 token, found 0")
        if not 1 <= k <= MAX_TOP_K:
            raise ValueError(f"slot_ids: expected 1 to {MAX_TOP_K} routes per token, found {k}")
        if num_experts is not None and num_experts < 1:
            raise ValueError(f"num_experts: expected at least 1, found {num_experts}")
        if min(S, H, I) == 0:
            raise ValueError(f"down: expected no empty dimension, found {tuple(down.shape)}")
        check_shape("slot_ids", ids, (T, k))
        check_shape("gate_up (as [S, N, H])", gate_up, (S, N, H))
        check_shape("down (as [S, H, I])", down, (S, H, I))
        if gate_up_bias is not None:
            check_shape("gate_up_bias", gate_up_bias, (S, N))
        if down_bias is not None:
            check_shape("down_bias", down_bias, (S, H))
        if (gate_up_bias is None) != (down_bias is None):
            raise ValueError("biases: expected both gate_up_bias and down_bias or neither")

        if hidden.dtype not in DTYPES:
            raise TypeError(f"hidden: expected one of {DTYPES}, found {hidden.dtype}")
        for name, tensor in (("gate_up", gate_up), ("down", down)):
            check_dtype(name, tensor, (hidden.dtype,))
        biases = {
            name: bias
            for name, bias in (("gate_up_bias", gate_up_bias), ("down_bias", down_bias))
            if bias is not None
        }
        for name, bias in biases.items():
            check_dtype(name, bias, (hidden.dtype, torch.float32))
        check_dtype("slot_ids", ids, ID_DTYPES)
        if expert_map is not None:
            check_dtype("expert_map", expert_map, ID_DTYPES)
            if expert_map.ndim != 1 or expert_map.numel() == 0:
                raise ValueError(f"expert_map: expected [E], found {tuple(expert_map.shape)}")
            check_contiguous("expert_map", expert_map)
        check_contiguous("slot_ids", ids)
        others = {"gate_up": gate_up, "down": down, "slot_ids": ids, **biases}
        if expert_map is not None:
            others["expert_map"] = expert_map
        for name, tensor in others.items():
            if tensor.device != hidden.device:
                raise ValueError(f"{name}: expected {hidden.device}, found {tensor.device}")

        check_unit_stride("hidden", hidden)
        for name, bias in biases.items():
            check_unit_stride(name, bias)
        for name, tensor in (("gate_up", gate_up), ("down", down)):
            if 1 not in (tensor.stride(1), tensor.stride(2)) and tensor[0].numel() > 1:
                raise ValueError(
                    f"{name}: expected a unit stride in one of the last two dimensions, "
                    f"found strides {tensor.stride()}"
                )
        problem = cls(
            hidden, ids, gate_up, down, expert_map, gate_up_bias, down_bias, read_through,
            activation, gated, interleaved, transposed, alpha, limit, num_experts, T, k, S, H, I,
        )  # fmt: skip
        if read_through is not None:
            check_read_through(problem, read_through)
        if check_ids:
            check_slots(ids, expert_map, S)
        return problem


def check_slots(ids: torch.Tensor, expert_map: torch.Tensor | None, slots: int) -> None:
    """Every id is -1 or names a slot (or, with a map, an expert whose entry does)."""
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "slot_ids cannot be checked while a CUDA graph is captured: pass check_ids=False"
        )
    if expert_map is None:
        check_range("slot_ids", ids, slots)
    else:
        check_range("expert ids", ids, expert_map.numel())
        check_range("expert_map", expert_map, slots)


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, found {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: torch.Tensor, expected: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in expected:
        wanted = " or ".join(dict.fromkeys(str(dtype) for dtype in expected))
        raise TypeError(f"{name}: expected {wanted}, found {tensor.dtype}")


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, found strides {tensor.stride()}")


def check_unit_stride(name: str, tensor: torch.Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: expected unit stride along rows, found {tensor.stride()}")


def check_range(name: str, ids: torch.Tensor, count: int) -> None:
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < -1 or high >= count:
        found = low if low < -1 else high
        raise ValueError(f"{name}: expected -1 or 0 to {count - 1}, found {found}")


def check_read_through(problem: Problem, source: ReadThrough) -> None:
    if problem.T != 1:
        raise ValueError(f"read_through: expected 1 token, found {problem.T}")
    addresses = {
        "gate_up": (source.gate_up, problem.gate_up),
        "down": (source.down, problem.down),
        "gate_up_bias": (source.gate_up_bias, problem.gate_up_bias),
        "down_bias": (source.down_bias, problem.down_bias),
    }
    for name, (address, segment) in addresses.items():
        if segment is None:
            continue
        if address is None:
            raise ValueError(f"read_through.{name}: expected addresses, found None")
        check_shape(f"read_through.{name}", address, (problem.k,))
        check_dtype(f"read_through.{name}", address, (torch.int64,))
        check_contiguous(f"read_through.{name}", address)
        if address.device != problem.hidden.device:
            raise ValueError(
                f"read_through.{name}: expected {problem.hidden.device}, found {address.device}"
            )
        step = segment.stride(0) * segment.element_size()
        if segment.data_ptr() % 16 or step % 16:
            raise ValueError(
                f"{name}: read_through expects slots aligned to 16 bytes, found a segment at "
                f"{segment.data_ptr() % 16} modulo 16 and {step} bytes from slot to slot"
            )
