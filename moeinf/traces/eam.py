"""The collection of expert activation matrices (EAMC) of MoE-Infinity, arXiv 2401.14361v3.

A request's matrix (rEAM, section 4.1) counts, per layer and expert, the tokens routed there;
prefill and decode are traced apart. The collection keeps a fixed number of them and can be saved
with the model. The policy and the predictor `eam` match running requests against it and add those
that finish; `ExpertCache.eamc` gives the grown collection back.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeinf import _core
from moeinf.errors import TraceError
from moeinf.traces import tensor_file
from moeinf.traces.trace import DECODE, PREFILL, Trace

FORMAT = "moeinf-eamc-1"
PAPER_CAPACITY: int = _core.Eamc.PAPER_CAPACITY
"""Entries at which the paper found more to be of no use (section 7)."""

Array = npt.NDArray[Any]


def activation_matrix(trace: Trace, phase: int) -> Array:
    """float32 [layers, num_experts]: tokens of `phase` routed to each expert, over the trace."""
    experts = trace.experts[trace.phase == phase]
    width = trace.num_experts + 1  # column 0 takes the -1
    places = experts.astype(np.int64) + 1 + np.arange(trace.num_layers)[:, None] * width
    counts = np.bincount(places.ravel(), minlength=trace.num_layers * width)
    return counts.reshape(trace.num_layers, width)[:, 1:].astype(np.float32)


class EAMC:
    """Activation matrices of finished requests, prefill and decode apart."""

    def __init__(
        self, *, num_layers: int, num_experts: int, capacity: int = PAPER_CAPACITY
    ) -> None:
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.capacity = capacity
        self.prefill = _core.EamCollection(num_layers, num_experts, capacity)
        self.decode = _core.EamCollection(num_layers, num_experts, capacity)

    @classmethod
    def from_core(cls, core: _core.Eamc) -> EAMC:
        """Of what a live cache has collected."""
        num_layers, num_experts = core.decode.shape
        collection = cls(
            num_layers=num_layers, num_experts=num_experts, capacity=core.decode.capacity
        )
        collection.prefill, collection.decode = core.prefill, core.decode
        return collection

    def to_core(self) -> _core.Eamc:
        """A copy, for a cache or a simulation to start from."""
        return _core.Eamc(self.prefill, self.decode)

    @classmethod
    def from_traces(cls, traces: Iterable[Trace], *, capacity: int = PAPER_CAPACITY) -> EAMC:
        """One matrix per sequence and phase of every trace, in order."""
        collection: EAMC | None = None
        for trace in traces:
            if collection is None:
                collection = cls(
                    num_layers=trace.num_layers, num_experts=trace.num_experts, capacity=capacity
                )
            collection.add(trace)
        if collection is None:
            raise ValueError("a collection needs at least one trace")
        return collection

    def add(self, trace: Trace) -> None:
        """Adds the requests of a trace. When full, a new matrix replaces the nearest one."""
        found = (trace.num_layers, trace.num_experts)
        if found != (self.num_layers, self.num_experts):
            raise TraceError(
                f"{trace.name}: expected {(self.num_layers, self.num_experts)} layers and experts "
                f"as in the collection, found {found}"
            )
        for sequence in trace.split():
            for phase, collection in ((PREFILL, self.prefill), (DECODE, self.decode)):
                matrix = activation_matrix(sequence, phase)
                if matrix.any():
                    collection.add(matrix)

    def save(self, path: str | Path) -> None:
        """Writes the collection. An older file at `path` is replaced whole or not at all."""
        tensor_file.write(
            path,
            {"prefill": self.prefill.entries(), "decode": self.decode.entries()},
            {"format": FORMAT, "capacity": str(self.capacity)},
        )

    @classmethod
    def load(cls, path: str | Path) -> EAMC:
        """Raises TraceError, naming file and tensor, for anything that is not a collection."""
        path = Path(path)
        metadata, tensors = tensor_file.read(path, FORMAT, {"prefill", "decode"}, set())
        prefill, decode = tensors["prefill"], tensors["decode"]
        text = metadata.get("capacity", "")
        capacity = int(text) if text.isascii() and text.isdigit() and len(text) < 7 else 0
        for field, matrices in (("prefill", prefill), ("decode", decode)):
            if (
                matrices.dtype != np.float32
                or matrices.ndim != 3
                or matrices.shape[1:] != decode.shape[1:]
                or not matrices.shape[0] <= capacity
            ):
                raise TraceError(
                    f"{path}: tensor '{field}': expected float32 [at most {capacity}, layers, "
                    f"experts], found {matrices.dtype} {list(matrices.shape)}"
                )
        collection = cls(num_layers=decode.shape[1], num_experts=decode.shape[2], capacity=capacity)
        try:
            for target, matrices in ((collection.prefill, prefill), (collection.decode, decode)):
                for matrix in matrices:
                    target.add(matrix)
        except ValueError as error:
            raise TraceError(f"{path}: {error}") from None
        return collection
