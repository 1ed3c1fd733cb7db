"""Calls that are decided once: everything that follows from a call's signature is kept.

Checks, block sizes and Triton's dispatch take the host longer than a GPU takes for the product of a
token. All of it depends only on shapes, strides, dtypes, devices, alignments and options: a call
whose signature was seen before hands over addresses and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton

# Every tensor of every kernel, by the place it has in the lists that are handed around here.
NAMES = (
    "hidden", "ids", "weights", "gate_up", "down", "expert_map", "gate_up_bias", "down_bias",
    "source_gate_up", "source_down", "source_gate_up_bias", "source_down_bias",
    "out", "routes", "act", "plan", "rows",
)  # fmt: skip
PLACES = {name: place for place, name in enumerate(NAMES)}
# Triton before 3.3 wants the compiled kernel called without its constants.
CONSTANTS_ARE_PASSED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
# Said aloud because Triton's default changes with its version.
FUSE = {"enable_fp_fusion": True}
NOTHING = contextlib.nullcontext()
MOST_PLANS = 4096

PLANS: dict[Hashable, Plan] = {}


class Launch:
    """A kernel, its grid and all its arguments but the tensors, which are named by parameter.

    The first call goes through Triton's compiler, later ones straight to what it returned.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], tensors: Mapping[str, str], **values: Any
    ) -> None:
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.tensors = {parameter: PLACES[name] for parameter, name in tensors.items()}
        self.values = values
        self.runner: Any = None
        self.arguments: list[Any] = []
        self.places: list[tuple[int, int]] = []

    def __call__(self, tensors: Sequence[torch.Tensor | None], addresses: Sequence[int]) -> None:
        if self.runner is None:
            pointers = {name: tensors[place] for name, place in self.tensors.items()}
            compiled = self.kernel[self.grid](**pointers, **self.values, **FUSE)
            self.keep(compiled)
            return
        arguments = self.arguments.copy()
        for argument, place in self.places:
            arguments[argument] = addresses[place]
        self.runner(*arguments)

    def keep(self, compiled: Any) -> None:
        """Nothing where Triton's interpreter ran the kernel, or a hook of Triton's did."""
        if compiled is None:
            return
        names = [
            name
            for place, name in enumerate(self.kernel.arg_names)
            if CONSTANTS_ARE_PASSED or place not in self.kernel.constexprs
        ]
        self.arguments = [self.values.get(name) for name in names]
        self.places = [
            (argument, self.tensors[name])
            for argument, name in enumerate(names)
            if name in self.tensors
        ]
        self.runner = compiled[self.grid]


@dataclass(frozen=True)
class Empty:
    """A tensor that a call allocates."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Plan:
    """What a call launches, what it returns, and the scratch tensors between its launches."""

    device: torch.device
    launches: tuple[Launch, ...]
    result: Empty
    scratch: tuple[Empty, ...] = ()

    def prepare(
        self, tensors: list[torch.Tensor | None], addresses: list[int]
    ) -> Callable[[], torch.Tensor]:
        """Allocates what the call needs; what it returns launches, and gives the result."""
        for empty in self.scratch:
            self.allocate(empty, tensors, addresses)
        if tensors[PLACES[self.result.name]] is None:
            self.allocate(self.result, tensors, addresses)
        return partial(self.launch, tensors, addresses)

    def allocate(
        self, empty: Empty, tensors: list[torch.Tensor | None], addresses: list[int]
    ) -> None:
        tensor = torch.empty(empty.shape, dtype=empty.dtype, device=self.device)
        place = PLACES[empty.name]
        tensors[place] = tensor
        addresses[place] = tensor.data_ptr()

    def launch(
        self, tensors: Sequence[torch.Tensor | None], addresses: Sequence[int]
    ) -> torch.Tensor:
        with on_device(self.device):
            for launch in self.launches:
                launch(tensors, addresses)
        result = tensors[PLACES[self.result.name]]
        assert result is not None
        return result


def places(**tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors in the order of NAMES."""
    return [tensors.get(name) for name in NAMES]


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


def keep(key: Hashable, plan: Plan) -> Plan:
    if len(PLANS) >= MOST_PLANS:  # a pool that is resized for ever
        PLANS.clear()
    PLANS[key] = plan
    return plan


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return NOTHING
    return torch.cuda.device(device)
