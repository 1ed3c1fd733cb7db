"""Records the routing of a live cache as a trace."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from moeinf.passes import Array, Pass, PassObserver
from moeinf.trace import DECODE, PREFILL, Trace

if TYPE_CHECKING:
    from moeinf.cache import ExpertCache


class Recorder(PassObserver):
    """Keeps what the router said of every token; made by `ExpertCache.record`.

    A context manager: recording ends with it. Costs one small copy per layer and pass, about 2 us.
    """

    def __init__(self, cache: ExpertCache):
        super().__init__(cache.store.num_layers)
        self._cache = cache
        self._parts: list[tuple[Array, ...]] = []
        self._sequences = 0  # numbers given so far

    def trace(self, *, model: str = "", source: str = "") -> Trace:
        """Everything recorded so far, sequence after sequence.

        Raises:
            ValueError: no complete forward pass was recorded.
        """
        self.finish_pass()
        if not self._parts:
            raise ValueError("nothing was recorded: no forward pass has gone through the cache")
        experts, weights, sequence, phase = (
            np.concatenate(arrays) for arrays in zip(*self._parts, strict=True)
        )
        order = np.argsort(sequence, kind="stable")  # a batch advances its sequences in turn
        return Trace(
            experts=experts[order],
            weights=weights[order],
            sequence=sequence[order],
            phase=phase[order],
            num_experts=self._cache.store.num_experts,
            model=model,
            source=source,
        )

    def on_pass(self, one: Pass) -> None:
        if one.new_sequence or self._sequences == 0:
            self._sequences += one.batch
        tokens = len(one.experts)
        first = self._sequences - one.batch
        sequence = np.repeat(np.arange(one.batch, dtype=np.int32) + first, tokens // one.batch)
        phase = np.full(tokens, PREFILL if one.prefill else DECODE, dtype=np.uint8)
        self._parts.append((one.experts, one.weights, sequence.astype(np.int32), phase))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cache.stop_recording()
