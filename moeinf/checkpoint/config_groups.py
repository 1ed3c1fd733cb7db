"""The groups of a compressed-tensors configuration: which modules have integers of which width.

A group has targets. A target is the path of a module, a pattern of paths after "re:", or the name
of a class of modules. For one module they count in this order, as in that library:

    its path, then the patterns that match its path; where there is neither, its class

Classes are not in the files. A module is a Linear, or an Embedding where its name says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moeinf.checkpoint.headers import TensorEntry
from moeinf.errors import CheckpointError

PATTERN = "re:"


@dataclass(frozen=True, slots=True)
class Integers:
    """
    group  the name of the group that says so
    bits   of an integer
    size   how many columns share a scale; 0 where the group does not say
    """

    group: str
    bits: int
    size: int

    def fits(self, values: TensorEntry, scales: TensorEntry) -> bool:
        """Whether the values, bytes or words, have as many columns as the scales are for."""
        columns = values.shape[-1] * (32 // self.bits if values.dtype == "I32" else 1)
        return not self.size or -(-columns // self.size) == scales.shape[-1]


class ConfigGroups:
    """The groups of integers in `config`, a `quantization_config` of `file`."""

    def __init__(self, config: Mapping[str, Any], file: Path):
        self._config = config
        self._file = file

    def find(self, module: str, values: TensorEntry, scales: TensorEntry) -> Integers | None:
        """How the integers of a module are stored; None where no group says so.

        Programs do not agree which of several patterns counts: compressed-tensors takes the first
        by the alphabet, vLLM the first of the file. So shapes decide: the first of the file counts
        whose columns are those of the scales.

        Raises:
            CheckpointError: a group that is malformed, or words that no group is for.
        """
        names, patterns = self._targets
        last = module.rpartition(".")[2]
        classes = ("Embedding", "Linear") if "embed" in last else ("Linear",)
        found = [names[module]] if module in names else []
        found += [one for pattern, one in patterns.items() if pattern.match(module)]
        found = found or [names[one] for one in classes if one in names]
        if not found and values.dtype == "I32" and (names or patterns):
            known = [*names, *(PATTERN + one.pattern for one in patterns)]
            more = f" and {len(known) - 5} more" if len(known) > 5 else ""
            raise CheckpointError(
                f"{values.path}: {values}: expected a target in config_groups of {self._file.name} "
                f"that matches {module!r} or its class {classes[0]}, found "
                f"{', '.join(map(repr, known[:5]))}{more}"
            )
        return next((one for one in found if one.fits(values, scales)), found[0] if found else None)

    @cached_property
    def _targets(self) -> tuple[dict[str, Integers], dict[re.Pattern[str], Integers]]:
        """By target: paths and classes, and patterns."""
        names: dict[str, Integers] = {}
        patterns: dict[re.Pattern[str], Integers] = {}
        for where, target, one in self._each():
            key: Any = target
            known: dict[Any, Integers] = names
            if target.startswith(PATTERN):
                known = patterns
                try:
                    key = re.compile(target.removeprefix(PATTERN))
                except re.error as error:
                    raise CheckpointError(
                        f"{where}: targets has {target!r}, which is no pattern: {error}"
                    ) from error
            other = known.setdefault(key, one)
            if (other.bits, other.size) != (one.bits, one.size):
                raise CheckpointError(
                    f"{where}: {target!r} is a target of {other.group} too, expected num_bits and "
                    f"group_size as there, {other.bits} and {other.size or None}; found {one.bits} "
                    f"and {one.size or None}"
                )
        return names, patterns

    def _each(self) -> Iterator[tuple[str, str, Integers]]:
        """Every target of a group of integers, and where it is."""
        groups = self._config.get("config_groups") or {}
        if not isinstance(groups, dict):
            raise CheckpointError(
                f"{self._file}: config_groups is {groups!r:.100}, expected an object with groups"
            )
        for name, group in groups.items():
            where = f"{self._file}: config_groups: {name}"
            if not isinstance(group, dict):
                raise CheckpointError(f"{where} is {group!r:.100}, expected an object")
            weights, targets = group.get("weights"), group.get("targets")
            if weights is None:
                continue
            if not isinstance(weights, dict):
                raise CheckpointError(f"{where}: weights is {weights!r:.100}, expected an object")
            if weights.get("type", "int") != "int":
                continue
            bits, size = weights.get("num_bits"), weights.get("group_size")
            if type(bits) is not int or bits < 1:
                raise CheckpointError(
                    f"{where}: num_bits is {bits!r:.100}, expected an integer > 0"
                )
            if size is not None and type(size) is not int:
                raise CheckpointError(f"{where}: group_size is {size!r:.100}, expected an integer")
            if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
                raise CheckpointError(
                    f"{where}: targets is {targets!r:.100}, expected a list of names"
                )
            one = Integers(name, bits, max(0, size or 0))
            yield from ((where, target, one) for target in targets)
