"""The experts modules of a model: what each computes, and which bytes of the files it needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from moeinf.checkpoint.formats import BIAS, VALUES
from moeinf.checkpoint.index import Expert, Slice
from moeinf.errors import UnsupportedError
from moeinf.integrations.transformers.weights import Traced
from moeinf.kernels.forms import ExpertForm


def experts_modules(model: torch.nn.Module) -> dict[str, Any]:
    """The modules that hold all experts of one layer, by path, in the order of layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    }


def parameters_of(module: Any) -> dict[str, tuple[int, ...]]:
    """The parameters that are served, and their shapes: [experts, ...].

    Others, as the norm that some experts end with, stay with the model.
    """
    names = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
    return {
        name: tuple(parameter.shape)
        for name, parameter in module.named_parameters(recurse=False)
        if name in names or name.removesuffix("_bias") in names
    }


def leave_out_experts(model: torch.nn.Module) -> None:
    """Removes the parameters that are served: nothing is allocated, drawn or read for them."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for path, module in experts_modules(model).items():
        for name in parameters_of(module):
            module.register_parameter(name, None)
            ties.pop(f"{path}.{name}", None)
        module._is_hf_initialized = True
        block: Any = model.get_submodule(path.rpartition(".")[0])
        if not block._parameters and not block._buffers:
            block._is_hf_initialized = True  # some blocks draw the parameters of their experts


@dataclass(frozen=True)
class Place:
    """Where one matrix of every expert lies: in tensors [..., rows, columns], or transposed.

    `tensor` and `lead` are of each expert: which source, and which matrix of it. The matrix begins
    at row `first` and takes every `step`-th, counted in small rows.
    """

    tensor: np.ndarray[Any, Any]
    lead: np.ndarray[Any, Any]
    first: int
    step: int
    rows: int
    transposed: bool


def find_experts(
    path: str, module: Any, form: ExpertForm, traced: Mapping[str, Traced]
) -> tuple[Sequence[Expert], bool]:
    """Every expert of a module, and whether the rows of gate and up alternate in its tensors.

    `traced` are the module's parameters, by name.

    Raises:
        UnsupportedError: bytes that lie in no order that the kernels can read.
    """
    experts: list[dict[tuple[str, str], Slice]] = [
        {} for _ in range(len(next(iter(traced.values())).origin))
    ]
    interleaved = False
    for name, one in traced.items():
        piece = BIAS if name.endswith("_bias") else VALUES
        origin = one.origin[..., None] if piece == BIAS else one.origin
        if module.is_transposed and piece == VALUES and not one.by_rows:
            origin = origin.transpose(0, 2, 1)
        joined = name.startswith("gate_up_proj")
        if not joined:
            matrix = "down" if name.startswith("down_proj") else "gate"
            parts = {matrix: origin}
        elif getattr(module, "is_concatenated", True):
            half = origin.shape[1] // 2
            parts = {"gate": origin[:, :half], "up": origin[:, half:]}
        else:
            parts = {"gate": origin[:, 0::2], "up": origin[:, 1::2]}
        places = {matrix: _place(f"{path}.{name}", one, part) for matrix, part in parts.items()}
        if joined and _beside(places["gate"], places["up"]):
            gate = places["gate"]
            interleaved |= gate.step == 2
            places = {"gate_up": replace(gate, step=1, rows=2 * gate.rows)}
        for matrix, place in places.items():
            if place.step != 1 or (place.transposed and place.rows != one.shapes[0][-1]):
                raise UnsupportedError(
                    f"{path}.{name}: expected rows of {one.tensors[0]} that follow each other"
                )
            for expert, found in zip(experts, _slices(one, place), strict=True):
                expert[matrix, piece] = found
    return experts, interleaved


def _place(name: str, traced: Traced, part: np.ndarray[Any, Any]) -> Place:
    """The place of a matrix of every expert: part [experts, rows, columns]."""
    tensor, flat = np.divmod(part, traced.stride)
    first = flat[:, 0, 0]
    steps = (flat - first[:, None, None])[0]
    _, rows, columns = part.shape
    tails = {
        (*traced.shapes[i], 1)[-2:] if columns == 1 else traced.shapes[i][-2:]
        for i in np.unique(tensor)
    }
    row, column = int(steps[1, 0]), int(steps[0, 1]) if columns > 1 else 1
    regular = np.arange(rows)[:, None] * row + np.arange(columns) * column
    one_tensor = (tensor == tensor[:, :1, :1]).all()
    if one_tensor and len(tails) == 1 and (flat == first[:, None, None] + regular).all():
        ((height, width),) = tails
        lead, within = np.divmod(first, height * width)
        start = int(within[0])
        if (within == start).all():
            if column == 1 and row % width == 0 and start % width == 0:
                return Place(tensor[:, 0, 0], lead, start // width, row // width, rows, False)
            if column == width and start < width:
                return Place(tensor[:, 0, 0], lead, start, row, rows, True)
    raise UnsupportedError(f"{name}: its elements lie scattered in {traced.tensors[0]}")


def _beside(gate: Place, up: Place) -> bool:
    """Gate and up fill the same matrices: one after the other, or row by row in turn."""
    alike = gate.step == up.step and gate.transposed == up.transposed and gate.first == 0
    after = {1: gate.rows, 2: 1}.get(gate.step)
    return (
        alike
        and up.first == after
        and bool((gate.tensor == up.tensor).all() and (gate.lead == up.lead).all())
    )


def _slices(traced: Traced, place: Place) -> Iterator[Slice]:
    """The bytes of the matrix of each expert, in real sizes."""
    depth = 1 if traced.origin.ndim == 2 else 2  # a bias, or a matrix
    first = int(place.tensor[0])
    shape = traced.tensors[first].shape
    nbytes = traced.tensors[first].nbytes // math.prod(shape[:-depth])  # of one whole matrix
    shape, small = shape[-depth:], traced.shapes[first][-depth:]
    if place.transposed:
        shape, small = shape[::-1], small[::-1]
    start, rows = place.first * shape[0] // small[0], place.rows * shape[0] // small[0]
    start = start * nbytes // shape[0]
    for tensor, lead in zip(place.tensor.tolist(), place.lead.tolist(), strict=True):
        yield Slice(
            traced.tensors[tensor], lead * nbytes + start, (rows, *shape[1:]), place.transposed
        )
