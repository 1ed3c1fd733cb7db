"""Which tensors of the files make up which parameter of a model, by transformers' own rules.

`find_sources` gives every tensor the name that transformers' loader gives it. A parameter may be
made of several tensors by operations (stack the experts, join gate and up, transpose, ...). Which
bytes of the files then hold which expert is not deduced from the operations: they run, on small
integer tensors whose elements say where they come from (`trace`). So an operation that only moves
elements needs no code here.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moeinf.checkpoint.headers import TensorEntry
from moeinf.checkpoint.packed import PackedEntry
from moeinf.errors import CheckpointError, UnsupportedError
from moeinf.integrations.transformers.families import renamings, views

EXPERT_NUMBER = re.compile(r"\.experts\.(?:expert_)?(\d+)\.")


@dataclass
class Sources:
    """The tensors that become one parameter, or several at once.

    `converter` is None where one tensor is the parameter itself. `tensors` are in the order in
    which transformers hands them to the converter, by the pattern of their name.
    """

    converter: Any = None
    tensors: dict[str, list[TensorEntry]] = field(default_factory=lambda: defaultdict(list))

    def all(self) -> list[TensorEntry]:
        """Every tensor, pattern by pattern."""
        return [entry for entries in self.tensors.values() for entry in entries]


def find_sources(
    model: Any, entries: Iterable[TensorEntry]
) -> tuple[dict[str, Sources], dict[str, TensorEntry]]:
    """The sources of the parameters and buffers of `model`, a model on the meta device, by their
    paths; and the tensors that belong to none, by their names in the files.

    A converter with several targets has its sources under the first of them.
    """
    mapping = [*get_model_conversion_mapping(model), *renamings(model)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    names = [one for one in mapping if isinstance(one, WeightRenaming)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    prefix, parameters = model.base_model_prefix, model.state_dict()
    found: dict[str, Sources] = {}
    unknown: dict[str, TensorEntry] = {}
    for name, alike in sorted(
        _by_expert(views(model, entries)).items(), key=lambda one: dot_natural_key(one[0])
    ):
        path, pattern = rename_source_key(name, names, converters, prefix, parameters)
        if path not in parameters and name in parameters:
            path, pattern = name, None
        if path not in parameters:
            unknown |= {entry.name: entry for entry in alike}
            continue
        sources = found.setdefault(path, Sources(by_pattern[pattern] if pattern else None))
        sources.tensors[pattern or name].extend(alike)
    return found, unknown


def _by_expert(entries: Iterable[TensorEntry]) -> dict[str, list[TensorEntry]]:
    """Tensors whose names differ in the number of the expert alone, under the name of expert 0.

    One of them is renamed for all: a checkpoint may have 20,000, and renaming takes 20 us.
    """
    groups: dict[str, list[tuple[int, TensorEntry]]] = defaultdict(list)
    for entry in entries:
        found = EXPERT_NUMBER.search(entry.name)
        if found is None:
            groups[entry.name].append((0, entry))
        else:
            name = f"{entry.name[: found.start(1)]}0{entry.name[found.end(1) :]}"
            groups[name].append((int(found[1]), entry))
    return {
        name: [entry for _, entry in sorted(group, key=lambda one: one[0])]
        for name, group in groups.items()
    }


@dataclass(frozen=True)
class Traced:
    """Where the elements of one parameter come from.

    origin   int64, of the shape of the parameter made small: the elements of tensors[i] are
             i * stride, i * stride + 1, ...
    tensors  the sources
    shapes   the small shape of each of them
    by_rows  one packed tensor [experts, outputs, inputs], whatever the module has
    """

    origin: np.ndarray[Any, Any]
    tensors: Sequence[TensorEntry]
    shapes: Sequence[tuple[int, ...]]
    stride: int
    by_rows: bool = False


def shrunk(sizes: Iterable[int]) -> dict[int, int]:
    """Small stand-ins for the sizes of matrices: equal, or twice another, just where the sizes are.

    Then an operation that looks at shapes decides for small tensors as it does for large ones.
    """
    small: dict[int, int] = {}
    spare = count(3, 2)
    for size in sorted(set(sizes)):
        half = small.get(size // 2) if size % 2 == 0 else None
        small[size] = 2 * half if half else next(spare)
    return small


def trace(
    name: str, sources: Sources, shapes: Mapping[str, tuple[int, ...]], config: Any
) -> dict[str, Traced]:
    """By parameter, where its elements come from, for every target of the sources of `name`.

    `shapes` are those of the parameters of all experts: [experts, ...].

    Raises:
        CheckpointError: tensors of a shape or number that does not give the parameter's.
        UnsupportedError: an operation that computes new values.
    """
    small = shrunk(size for shape in shapes.values() for size in shape[1:])

    @cache
    def shrink(shape: tuple[int, ...]) -> tuple[int, ...]:
        head = len(shape) - len(shapes[name]) + 1  # 1: of all experts, 0: of one
        if head not in (0, 1) or not small.keys() >= set(shape[head:]):
            odd = next(entry for entry in tensors if entry.shape == shape)
            raise CheckpointError(
                f"{odd.path}: {odd}: expected a shape that fits {name} {list(shapes[name])}"
            )
        return (*shape[:head], *(small[size] for size in shape[head:]))

    tensors = sources.all()
    small_shapes = [shrink(entry.shape) for entry in tensors]
    stride = max(math.prod(shape) for shape in small_shapes)
    rows = iter(torch.arange(len(tensors) * stride, device="cpu").view(-1, stride))
    collected = {
        pattern: [
            next(rows)[: math.prod(shape)].view(shape)
            for shape in (shrink(entry.shape) for entry in entries)
        ]
        for pattern, entries in sources.tensors.items()
    }
    wanted = {
        path: (shape[0], *(small[size] for size in shape[1:])) for path, shape in shapes.items()
    }
    traced = {}
    for target, value in _convert(name, sources, collected, wanted, config).items():
        if value.dtype != torch.int64:
            raise UnsupportedError(f"{target}: transformers computes it from {tensors[0]}")
        if tuple(value.shape) != wanted.get(target):
            raise _does_not_fit(target, shapes, sources)
        by_rows = sources.converter is None and isinstance(tensors[0], PackedEntry)
        traced[target] = Traced(value.numpy(), tensors, small_shapes, stride, by_rows)
    return traced


def _convert(
    name: str,
    sources: Sources,
    collected: dict[str, Any],
    wanted: Mapping[str, tuple[int, ...]],
    config: Any,
) -> dict[str, torch.Tensor]:
    """What transformers' loader makes of the collected tensors, by parameter."""
    converter = sources.converter
    if converter is None:
        (value,) = collected[next(iter(collected))]
        return {name: value}
    model = SimpleNamespace(  # where an operation asks for the parameter's shape
        get_parameter=lambda path: torch.empty(wanted[path], device="meta"), config=config
    )
    try:
        for operation in converter.operations:
            collected = operation.convert(
                collected,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=name,
                model=model,
                config=config,
                missing_keys=None,
            )
    except Exception as error:
        raise _does_not_fit(name, wanted, sources) from error
    first = next(target for target in collected if target in name)
    values = {
        name.replace(first, target, 1): value[0] if isinstance(value, list) else value
        for target, value in collected.items()
    }
    return values


def _does_not_fit(
    target: str, shapes: Mapping[str, tuple[int, ...]], sources: Sources
) -> CheckpointError:
    """Names what is missing or odd among the sources of a parameter."""
    tensors = sources.all()
    where = f"{tensors[0].path}: {target}"
    converter = sources.converter
    for pattern in converter.source_patterns if converter is not None else ():
        entries = sources.tensors.get(pattern, [])
        if not entries:
            return CheckpointError(f"{where}: no tensor for its {pattern}")
    for entries in sources.tensors.values():
        odd = next((e for e in entries if e.shape != entries[0].shape), None)
        if odd is not None:
            return CheckpointError(f"{odd.path}: {odd}: expected the shape of {entries[0]}")
        if len(entries) > 1:
            numbers = [EXPERT_NUMBER.search(entry.name) for entry in entries]
            there = {int(number[1]) for number in numbers if number is not None}
            experts = shapes[target][0]
            if max(there, default=0) >= experts:
                return CheckpointError(
                    f"{where}: config.json says there are {experts} experts, found a tensor of "
                    f"expert {max(there)} beside {entries[0]}"
                )
            missing = sorted(set(range(experts)) - there)
            if missing:
                return CheckpointError(
                    f"{where}: no tensor of expert {missing[0]} beside {entries[0]}"
                )
    return CheckpointError(
        f"{where}: expected {list(shapes[target])} of {len(tensors)} tensors, found {tensors[0]}"
    )
