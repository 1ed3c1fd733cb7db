"""Launches that are decided once: 194 us of host time per decode call become 33.

(Measured for the two launches of a call of one token; benchmarks/results/host_time.json.)

Checks, block sizes and Triton's dispatch take the host longer than a GPU takes for the products of
a token. They depend only on the call's signature: shapes, strides, dtypes, devices, alignments and
options. So the first call of a signature makes a `LaunchPlan`, which keeps the compiled kernels and
their arguments. Later calls replace the addresses and go straight to Triton's launcher. A test
compares these launches, parameter by parameter, with those of Triton's own dispatch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton

from .forms import ExpertMatrices

# Every tensor of every kernel, by its index in the lists that are handed around here. The pointer
# parameter of a kernel has the name of its tensor and "_ptr".
MATRICES = (
    "gate", "up", "down", "gate_scales", "up_scales", "down_scales",
    "gate_zeros", "up_zeros", "down_zeros",
    "gate_multiplier", "up_multiplier", "down_multiplier", "gate_bias", "up_bias", "down_bias",
)  # fmt: skip
NAMES = (
    "hidden", "ids", "weights", "map", "out", "routes", "act", "groups", "rows", *MATRICES,
)  # fmt: skip
INDEX = {name: index for index, name in enumerate(NAMES)}
# Triton before 3.3 wants the compiled kernel called without its constants.
CONSTANTS_ARE_PASSED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
# Set explicitly: the default differs between Triton versions.
FUSE = {"enable_fp_fusion": True}
NOTHING = contextlib.nullcontext()
MAX_PLANS = 4096

PLANS: dict[Hashable, LaunchPlan] = {}

Tensors = list[torch.Tensor | None]


class Launch:
    """A kernel, its grid and all its arguments but the tensors.

    The first call goes through Triton's compiler, later ones straight to the launcher it returned.
    `renamed` gives a pointer parameter another tensor than that of its name. A tensor that is
    absent is passed as None, which is a constant to Triton.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        renamed: Mapping[str, str] | None = None,
        **values: Any,
    ) -> None:
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.tensor_of = {
            name: INDEX[(renamed or {}).get(stem, stem)]
            for name in kernel.arg_names
            if (stem := name.removesuffix("_ptr")) != name
        }
        self.values = values
        self.launcher: Any = None
        self.arguments: list[Any] = []
        self.addresses: list[tuple[int, int]] = []  # (index of an argument, index of its tensor)

    def __call__(self, tensors: Tensors, addresses: Sequence[int]) -> None:
        if self.launcher is None:
            pointers = {name: tensors[index] for name, index in self.tensor_of.items()}
            compiled = self.kernel[self.grid](**pointers, **self.values, **FUSE)
            self.remember(compiled, pointers)
            return
        arguments = self.arguments.copy()
        for argument, tensor in self.addresses:
            arguments[argument] = addresses[tensor]
        self.launcher(*arguments)

    def remember(self, compiled: Any, pointers: Mapping[str, torch.Tensor | None]) -> None:
        """`compiled` is None where Triton's interpreter ran the kernel, or a hook of Triton's."""
        if compiled is None:
            return
        names = [
            name
            for place, name in enumerate(self.kernel.arg_names)
            if CONSTANTS_ARE_PASSED or place not in self.kernel.constexprs
        ]
        self.arguments = [self.values.get(name) for name in names]
        self.addresses = [
            (argument, self.tensor_of[name])
            for argument, name in enumerate(names)
            if pointers.get(name) is not None
        ]
        self.launcher = compiled[self.grid]


@dataclass(frozen=True)
class Scratch:
    """A tensor that a call allocates."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class LaunchPlan:
    """What a call launches, what it returns, and the scratch tensors between its launches."""

    device: torch.device
    launches: tuple[Launch, ...]
    result: Scratch
    scratch: tuple[Scratch, ...] = ()

    def prepare(self, tensors: Tensors, addresses: list[int]) -> Callable[[], torch.Tensor]:
        """Allocates what the call needs; what it returns launches, and gives the result."""
        for scratch in self.scratch:
            self.allocate(scratch, tensors, addresses)
        if tensors[INDEX[self.result.name]] is None:
            self.allocate(self.result, tensors, addresses)
        return partial(self.launch, tensors, addresses)

    def allocate(self, scratch: Scratch, tensors: Tensors, addresses: list[int]) -> None:
        tensor = torch.empty(scratch.shape, dtype=scratch.dtype, device=self.device)
        index = INDEX[scratch.name]
        tensors[index] = tensor
        addresses[index] = tensor.data_ptr()

    def launch(self, tensors: Tensors, addresses: Sequence[int]) -> torch.Tensor:
        with on_device(self.device):
            for launch in self.launches:
                launch(tensors, addresses)
        result = tensors[INDEX[self.result.name]]
        assert result is not None
        return result


def signature(tensors: Sequence[torch.Tensor | None]) -> tuple[Hashable, list[int]]:
    """What checks, block sizes and compiled code can depend on, and the address of each tensor."""
    parts: list[Hashable] = []
    addresses = []
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
            addresses.append(0)
        else:
            address = tensor.data_ptr()
            addresses.append(address)
            parts.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.device, address % 16))
    return tuple(parts), addresses


class MatricesSignature:
    """The signature of an `ExpertMatrices`, kept with it. Equal signatures are one object, so that
    a look-up compares and hashes nothing but its identity."""

    known: dict[Hashable, MatricesSignature] = {}  # noqa: RUF012

    @classmethod
    def of(cls, matrices: ExpertMatrices) -> tuple[MatricesSignature, list[int]]:
        """Looks at the tensors again only where the memory of one of them has moved."""
        tensors = matrices.tensors
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        kept = matrices.__dict__.get("_signature")
        if kept is None or kept[1] != addresses:
            parts, _ = signature(tensors)
            every = (matrices.gate, matrices.up, matrices.down)
            kinds = (m and (m.format, m.block, m.scales is None or m.scales.dtype) for m in every)
            key = (parts, *kinds)
            kept = (cls.known.setdefault(key, cls()), addresses)
            matrices.__dict__["_signature"] = kept
        return kept


def remember(key: Hashable, plan: LaunchPlan) -> LaunchPlan:
    if len(PLANS) >= MAX_PLANS:  # a pool that is resized again and again
        PLANS.clear()
        MatricesSignature.known.clear()
    PLANS[key] = plan
    return plan


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return NOTHING
    return torch.cuda.device(device)
