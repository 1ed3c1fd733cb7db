"""A store of experts that lie in no file: tensors that a runtime holds, or what a callback writes.

Both say the bytes of an expert segment by segment, as `Layout` names them. Nothing is converted.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moeinf.checkpoint.extent import Extent
from moeinf.checkpoint.formats import MULTIPLIER, PLAIN_FORMATS
from moeinf.checkpoint.headers import TensorEntry
from moeinf.checkpoint.held import callback, hold, hold_tensor
from moeinf.checkpoint.layout import Formats, Layout, Segment, format_of_each
from moeinf.errors import ReadError
from moeinf.kernels.forms import ExpertForm

Array = Any
"""A tensor, an array (numpy, or anything with its interface), or (address, shape, dtype)."""
Read = Callable[[int, int, str, memoryview], int]


@dataclass(frozen=True)
class Held:
    """Experts of one layout. `places`: by module and expert, the extents of an expert."""

    layout: Layout
    places: Mapping[str, Sequence[list[Extent]]]
    transposes: Sequence[tuple[int, int, int, int]] = ()


def from_tensors(
    layers: Mapping[int, Mapping[str, Any]] | Sequence[Mapping[str, Any]],
    *,
    form: ExpertForm,
    formats: Formats | None,
    interleaved: bool,
    transposed: bool,
) -> Held:
    """See `ExpertStore.from_tensors`."""
    numbered = dict(layers) if isinstance(layers, Mapping) else dict(enumerate(layers))
    if not numbered:
        raise ValueError("layers: expected at least one, found none")
    first = next(iter(numbered.values()))
    layout = _layout_of(first, form, formats, interleaved, transposed)
    places = {}
    for number, tensors in numbered.items():
        parts: dict[str, list[Extent]] = {}
        for segment in layout.segments:
            parts |= _parts_of(f"layer {number}", tensors, segment, transposed)
        if left := sorted(set(tensors) - set(parts)):
            raise ValueError(
                f"layer {number}: {', '.join(left)}: expected "
                + ", ".join(segment.name for segment in layout.segments)
            )
        counts = {len(experts) for experts in parts.values()}
        if len(counts) > 1:
            raise ValueError(f"layer {number}: found {sorted(counts)} experts in its tensors")
        places[f"layers.{number}"] = [list(one) for one in zip(*parts.values(), strict=True)]
    sizes = {len(experts) for experts in places.values()}
    if len(sizes) > 1:
        raise ValueError(f"expected as many experts in every layer, found {sorted(sizes)}")
    turned = [
        (matrix.values.offset, matrix.cols, matrix.rows, matrix.format.values.itemsize)
        for matrix in layout.named.values()
        if transposed
    ]
    if transposed and layout.up is not None and "gate" not in first:
        (offset, cols, rows, element), _, down = turned
        turned = [(offset, cols, 2 * rows, element), down]
    return Held(layout, places, turned)


def from_callback(
    read: Read,
    *,
    layers: int | Sequence[int],
    num_experts: int,
    hidden: int,
    intermediate: int,
    form: ExpertForm,
    formats: Formats,
    interleaved: bool,
    bias: torch.dtype,
) -> Held:
    """See `ExpertStore.from_callback`."""
    numbers = list(range(layers)) if isinstance(layers, int) else list(layers)
    if not numbers or num_experts < 1:
        raise ValueError(
            f"expected at least one layer and one expert, found {len(numbers)} and {num_experts}"
        )
    layout = Layout.of(form, formats, hidden, intermediate, interleaved=interleaved, bias=bias)
    total = len(numbers) * num_experts

    def source_of(segment: Segment) -> TensorEntry:
        def fill(offset: int, view: memoryview) -> int:
            index, begin = divmod(offset, segment.nbytes)
            layer, expert = divmod(index, num_experts)
            whole = view if len(view) == segment.nbytes else memoryview(bytearray(segment.nbytes))
            try:
                written = read(layer, expert, segment.name, whole)
            except Exception as error:
                raise ReadError(
                    f"layer {layer}, expert {expert}: {type(error).__name__}: {error}"
                ) from error
            if written != segment.nbytes:
                raise ReadError(
                    f"layer {layer}, expert {expert}: expected {segment.nbytes} bytes, "
                    f"{written} were written"
                )
            if whole is not view:
                view[:] = whole[begin : begin + len(view)]
            return len(view)

        name = f"callback for {segment.name}"
        return hold(name, total * segment.nbytes, callback(fill))

    sources = [(source_of(segment), segment) for segment in layout.segments]
    places = {
        f"layers.{number}": [
            [
                Extent(
                    entry,
                    (layer * num_experts + expert) * segment.nbytes,
                    segment.nbytes,
                    segment.offset,
                )
                for entry, segment in sources
            ]
            for expert in range(num_experts)
        ]
        for layer, number in enumerate(numbers)
    }
    return Held(layout, places)


def _layout_of(
    tensors: Mapping[str, Any],
    form: ExpertForm,
    formats: Formats | None,
    interleaved: bool,
    transposed: bool,
) -> Layout:
    """The layout that the tensors of a layer fit."""
    names: tuple[str, ...] = ("gate", "up", "down") if form.has_gate else ("gate", "down")
    if form.has_gate and "gate" not in tensors:
        names = "gate_up", "down"
    for name in (*names, *(["down.bias"] if form.has_bias else [])):
        if name not in tensors:
            raise ValueError(f"expected a tensor {name!r}, found {', '.join(tensors) or 'none'}")
    heads = [_experts_of(name, tensors[name])[0] for name in names]
    if any(head.dim() != 2 for head in heads):
        raise ValueError(f"{' and '.join(names)}: expected [experts, rows, columns]")
    if interleaved and "up" in names:
        raise ValueError("interleaved: expected gate and up in one tensor, row by row in turn")
    if formats is None:
        for head in heads:
            if head.dtype not in PLAIN_FORMATS:
                raise ValueError(
                    f"{' and '.join(names)}: {head.dtype} does not say how weights are stored: "
                    "give formats"
                )
        formats = tuple(PLAIN_FORMATS[head.dtype] for head in heads)
    every = format_of_each(formats)
    if transposed and any(row not in PLAIN_FORMATS.values() for row in every):
        raise ValueError("transposed: expected formats of one element a value, without scales")
    rows, stored = heads[-1].shape[::-1] if transposed else heads[-1].shape
    bias = _experts_of("down.bias", tensors["down.bias"])[0].dtype if form.has_bias else None
    return Layout.of(
        form, every, rows, every[-1].cols(stored),
        interleaved=interleaved, bias=bias or torch.bfloat16,
    )  # fmt: skip


def _parts_of(
    where: str, tensors: Mapping[str, Any], segment: Segment, transposed: bool
) -> dict[str, list[Extent]]:
    """By name of a tensor, the place of each expert: of a segment there is one tensor, or that of
    gate and that of up, one after the other."""
    matrix, dot, piece = segment.name.partition(".")
    names: tuple[str, ...] = (segment.name,)
    if segment.name not in tensors and matrix == "gate_up":
        names = f"gate{dot}{piece}", f"up{dot}{piece}"
    rows, *width = segment.shape
    shape = (rows // len(names), *width)
    if transposed and not piece:
        shape = shape[::-1]
    parts, offset = {}, segment.offset
    for name in names:
        if name not in tensors:
            raise ValueError(f"{where}: expected a tensor {name!r}, found {', '.join(tensors)}")
        each = segment.nbytes // len(names)
        label = f"{where}: {name}"
        experts = []
        for number, one in enumerate(_experts_of(label, tensors[name])):
            if piece == MULTIPLIER and one.numel() == 1:
                one = one.reshape(1)
            if not _is(one.dtype, segment.dtype) or tuple(one.shape) != shape:
                raise ValueError(
                    f"{label}: expected {segment.dtype} {list(shape)} for each expert, found "
                    f"{one.dtype} {list(one.shape)}"
                )
            if not one.is_contiguous():
                raise ValueError(f"{label}: the elements of an expert do not lie side by side")
            entry = hold_tensor(f"{label}, expert {number}", one, tensors[name])
            experts.append(Extent(entry, 0, each, offset))
        parts[name] = experts
        offset += each
    return parts


# What a runtime or a library without the dtype holds its bytes as.
_BYTES = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32)


def _is(found: torch.dtype, wanted: torch.dtype) -> bool:
    """Do elements of one dtype pass as bytes of the other?"""
    same_width = found.itemsize == wanted.itemsize
    return found == wanted or (same_width and (found in _BYTES or wanted == torch.uint8))


def _experts_of(where: str, value: Any) -> list[torch.Tensor]:
    """One tensor for each expert, over the caller's memory."""
    found = [_tensor_of(where, v) for v in value] if isinstance(value, list) else None
    if found is None:
        whole = _tensor_of(where, value)
        found = list(whole) if whole.dim() else []
    if not found:
        raise ValueError(f"{where}: expected at least one expert, found none")
    return found


def _tensor_of(where: str, value: Array) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"{where}: expected a tensor in RAM, found one on {value.device}")
        return value.detach()
    if isinstance(value, tuple):
        address, shape, dtype = value
        nbytes = math.prod(shape) * dtype.itemsize
        if not address or nbytes < 1:
            raise ValueError(f"{where}: expected bytes, found {nbytes} at address {address}")
        raw = (ctypes.c_char * nbytes).from_address(address)
        return torch.frombuffer(raw, dtype=dtype).view(shape)
    array = np.asarray(value)
    with warnings.catch_warnings():  # of torch: nobody writes to them here
        warnings.filterwarnings("ignore", "The given NumPy array is not writ")
        try:
            return torch.from_numpy(array)
        except TypeError as error:
            raise ValueError(
                f"{where}: {array.dtype}: view it as uint{8 * array.itemsize}"
            ) from error
