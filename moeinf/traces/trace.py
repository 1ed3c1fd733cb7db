"""Routing traces: which experts real runs used, token by token.

A trace is what the simulator replays, the report draws and a collection is built from. Files are
safetensors (format `moeinf-trace-1`), so loading one runs no code; every id, size and phase is
checked before anything uses it. Nothing here records: the live cache does.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeinf import _core
from moeinf.errors import TraceError
from moeinf.traces import tensor_file

FORMAT = "moeinf-trace-1"
PREFILL, DECODE = 0, 1
_DTYPES = {
    "experts": ("int16",),
    "weights": ("float32", "float16"),
    "router": ("float16",),
    "sequence": ("int32",),
    "phase": ("uint8",),
}
_OPTIONAL = ("weights", "router")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Trace:
    """The routing of some runs, sequence after sequence.

    experts   int16 [tokens, layers, k]            routed expert ids in routing order, -1: none
    sequence  int32 [tokens]                       which request; never decreases
    phase     uint8 [tokens]                       0 prefill, 1 decode
    weights   float32 or float16, as experts       router weights, optional
    router    float16 [tokens, layers, num_experts] router probabilities of all experts, optional

    Raises TraceError on construction if shapes, dtypes or values do not fit together.
    """

    experts: Array
    sequence: Array
    phase: Array
    num_experts: int
    weights: Array | None = None
    router: Array | None = None
    model: str = ""
    source: str = ""
    license: str = ""
    name: str = "trace"

    def __post_init__(self) -> None:
        for field, dtypes in _DTYPES.items():
            array = getattr(self, field)
            if array is None and field in _OPTIONAL:
                continue
            if not isinstance(array, np.ndarray) or array.dtype.name not in dtypes:
                found = getattr(array, "dtype", type(array).__name__)
                raise TraceError(
                    f"{self.name}: tensor '{field}': expected {' or '.join(dtypes)}, found {found}"
                )
        if self.experts.ndim != 3:
            raise TraceError(
                f"{self.name}: tensor 'experts': expected 3 dimensions [tokens, layers, k], "
                f"found {self.experts.ndim}"
            )
        tokens, layers, _ = self.experts.shape
        if (
            not isinstance(self.num_experts, (int, np.integer))
            or not 1 <= self.num_experts <= np.iinfo(np.int16).max
        ):
            raise TraceError(
                f"{self.name}: num_experts: expected 1 to {np.iinfo(np.int16).max}, "
                f"found {self.num_experts!r}"
            )
        shapes = {
            "sequence": (tokens,),
            "phase": (tokens,),
            "weights": self.experts.shape,
            "router": (tokens, layers, self.num_experts),
        }
        for field, shape in shapes.items():
            array = getattr(self, field)
            if array is not None and array.shape != shape:
                raise TraceError(
                    f"{self.name}: tensor '{field}': expected shape {list(shape)}, "
                    f"found {list(array.shape)}"
                )
        for field in _DTYPES:
            array = getattr(self, field)
            if array is not None and not array.flags.c_contiguous:
                object.__setattr__(self, field, np.ascontiguousarray(array))
        for field in _OPTIONAL:
            array = getattr(self, field)
            if array is not None and not np.isfinite(array).all():
                raise TraceError(
                    f"{self.name}: tensor '{field}': expected finite values, found NaN or infinity"
                )
        if self.router is not None and self.router.size:
            low, high = self.router.min(), self.router.max()
            if low < 0 or high > 1:
                raise TraceError(
                    f"{self.name}: tensor 'router': expected probabilities from 0 to 1, "
                    f"found {low} to {high}"
                )
        try:
            _core.check_trace(self.experts, self.sequence, self.phase, self.num_experts, self.name)
        except ValueError as error:
            raise TraceError(str(error)) from None

    @property
    def num_tokens(self) -> int:
        return int(self.experts.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.experts.shape[2])

    @property
    def total_experts(self) -> int:
        return self.num_layers * self.num_experts

    def info(self) -> dict[str, Any]:
        """Sizes, counts and where the trace comes from, ready for JSON."""
        return {
            "name": self.name,
            "model": self.model,
            "source": self.source,
            "license": self.license,
            "tokens": self.num_tokens,
            "prefill_tokens": int((self.phase == PREFILL).sum()),
            "decode_tokens": int((self.phase == DECODE).sum()),
            "sequences": int(np.unique(self.sequence).size),
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "experts_used": int(_used(self).sum()),
            "weights": self.weights is not None,
            "router": self.router is not None,
        }

    def split(self) -> list[Trace]:
        """One trace per sequence, in order of time, as views of this one."""
        starts = np.flatnonzero(np.diff(self.sequence)) + 1
        bounds = [0, *starts.tolist(), self.num_tokens]
        return [self.tokens(a, b) for a, b in itertools.pairwise(bounds)]

    def tokens(self, start: int, end: int) -> Trace:
        """Tokens [start, end) as a view."""
        if not 0 <= start < end <= self.num_tokens:
            raise TraceError(
                f"{self.name}: expected tokens within 0 and {self.num_tokens}, "
                f"found {start} to {end}"
            )
        fields: dict[str, Any] = {
            field: None if (array := getattr(self, field)) is None else array[start:end]
            for field in _DTYPES
        }
        return replace(self, **fields)

    @classmethod
    def concat(cls, traces: Sequence[Trace], *, name: str = "trace") -> Trace:
        """The sequences of all of them, one trace after the other, numbered anew from 0.

        Weights and router probabilities are kept if every trace has them. Raises TraceError if
        layers, experts or k differ.
        """
        if not traces:
            raise TraceError(f"{name}: expected at least one trace to join, found none")
        first = traces[0]
        shape = (first.num_layers, first.num_experts, first.top_k)
        sequences, offset = [], 0
        for trace in traces:
            found = (trace.num_layers, trace.num_experts, trace.top_k)
            if found != shape:
                raise TraceError(
                    f"{trace.name}: expected {shape} layers, experts and k as in {first.name}, "
                    f"found {found}"
                )
            numbers = np.cumsum(np.diff(trace.sequence, prepend=trace.sequence[:1]) > 0)
            sequences.append((numbers + offset).astype(np.int32))
            offset += int(numbers[-1]) + 1
        joined: dict[str, Any] = {
            field: None
            if any(getattr(trace, field) is None for trace in traces)
            else np.concatenate([getattr(trace, field) for trace in traces])
            for field in ("experts", "phase", "weights", "router")
        }
        return replace(first, sequence=np.concatenate(sequences), name=name, **joined)

    def save(self, path: str | Path) -> None:
        """Writes a trace file. An older file at `path` is replaced whole or not at all."""
        tensors = {field: array for field in _DTYPES if (array := getattr(self, field)) is not None}
        tensor_file.write(
            path,
            tensors,
            {
                "format": FORMAT,
                "model": self.model,
                "num_layers": str(self.num_layers),
                "num_experts": str(self.num_experts),
                "top_k": str(self.top_k),
                "source": self.source,
                "license": self.license,
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Reads a trace file. Raises TraceError, naming file and tensor, for anything unfit."""
        path = Path(path)
        metadata, tensors = tensor_file.read(
            path, FORMAT, set(_DTYPES) - set(_OPTIONAL), set(_OPTIONAL)
        )
        trace = cls(
            **tensors,
            num_experts=_number(path, metadata, "num_experts"),
            model=metadata.get("model", ""),
            source=metadata.get("source", ""),
            license=metadata.get("license", ""),
            name=path.name,
        )
        for field in ("num_layers", "top_k"):
            if _number(path, metadata, field) != getattr(trace, field):
                raise TraceError(
                    f"{path}: metadata {field!r}: expected {getattr(trace, field)} as in tensor "
                    f"'experts', found {metadata[field]}"
                )
        return trace

    @classmethod
    def from_arrays(
        cls,
        experts: npt.ArrayLike,
        *,
        num_experts: int,
        sequence: npt.ArrayLike | None = None,
        phase: npt.ArrayLike | None = None,
        weights: npt.ArrayLike | None = None,
        router: npt.ArrayLike | None = None,
        model: str = "",
        source: str = "",
        license: str = "",
        name: str = "arrays",
    ) -> Trace:
        """From integer ids [tokens, layers, k], as serving engines capture them.

        Without `sequence` all tokens are one sequence; without `phase` all are decode tokens.
        """
        ids = _integers(name, "experts", experts, np.int16)
        tokens = ids.shape[:1]
        return cls(
            experts=ids,
            sequence=np.zeros(tokens, np.int32)
            if sequence is None
            else _integers(name, "sequence", sequence, np.int32),
            phase=np.full(tokens, DECODE, np.uint8)
            if phase is None
            else _integers(name, "phase", phase, np.uint8),
            weights=None if weights is None else _floats(name, "weights", weights, np.float32),
            router=None if router is None else _floats(name, "router", router, np.float16),
            num_experts=num_experts,
            model=model,
            source=source,
            license=license,
            name=name,
        )


def _integers(name: str, tensor: str, values: npt.ArrayLike, dtype: Any) -> Array:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise TraceError(f"{name}: tensor '{tensor}': expected an array: {error}") from None
    if array.dtype.kind not in "iu":
        raise TraceError(f"{name}: tensor '{tensor}': expected integers, found {array.dtype}")
    limits = np.iinfo(dtype)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise TraceError(
            f"{name}: tensor '{tensor}': expected values that fit {limits.dtype}, "
            f"found {array.min()} to {array.max()}"
        )
    return np.ascontiguousarray(array, dtype)


def _floats(name: str, tensor: str, values: npt.ArrayLike, dtype: Any) -> Array:
    try:
        with np.errstate(over="ignore"):  # infinite then, and refused as such
            return np.asarray(values, dtype)
    except ValueError as error:
        raise TraceError(f"{name}: tensor '{tensor}': expected an array: {error}") from None


def _number(path: Path, metadata: dict[str, str], key: str) -> int:
    text = metadata.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise TraceError(f"{path}: metadata {key!r}: expected a whole number, found {text!r}")
    return int(text)


def _used(trace: Trace) -> Array:
    """bool [layers, num_experts]: used at least once."""
    used = np.zeros((trace.num_layers, trace.num_experts + 1), bool)  # the last column takes -1
    for layer in range(trace.num_layers):
        used[layer, trace.experts[:, layer]] = True
    return used[:, :-1]
