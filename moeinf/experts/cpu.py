"""The CPU backend: checks tensors, and hands their addresses to the C++ kernels."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from moeinf import _core
from moeinf.cache.cache import ExpertCache
from moeinf.checkpoint.formats import SCALE_TYPES, WeightFormat
from moeinf.checkpoint.layout import Layout, MatrixLayout, Rows
from moeinf.cpus import usable_cpus
from moeinf.experts.checks import DTYPES, check_tensors
from moeinf.experts.marks import Marks
from moeinf.kernels.forms import ExpertForm

HOST = torch.device("cpu")
SCALES = {name: getattr(_core.ScaleType, name) for name in SCALE_TYPES}


_threads: int | None = None  # that `use_threads` asked for


@lru_cache(maxsize=1)
def default_engine() -> _core.CpuEngine:
    """The process's engine: the best instruction set, as many threads as torch uses, and no more
    than processors that may be used."""
    return _core.CpuEngine(threads=_threads or min(torch.get_num_threads(), usable_cpus()))


def use_threads(threads: int) -> None:
    """Sets the threads of the process's engine. An expert's bits are the same with any number.

    What was made with another engine keeps that one. Raises ValueError for more threads than
    processors that may be used: they would wait for one another.
    """
    global _threads
    usable = usable_cpus()
    if not 1 <= threads <= usable:
        raise ValueError(
            f"threads={threads}: expected 1 to {usable}, the processors that this process may use"
        )
    _threads = threads
    if default_engine().threads != threads:
        default_engine.cache_clear()


def core_expert(form: ExpertForm, layout: Layout) -> _core.ExpertFfn:
    """The description of an expert for the C++ core."""
    gate = form.gate
    return _core.ExpertFfn(
        gate=core_matrix(layout.gate),
        up=None if layout.up is None else core_matrix(layout.up),
        down=core_matrix(layout.down),
        function=_core.Gate(gate.function, gate.activation, alpha=gate.alpha, limit=gate.limit),
    )


def core_matrix(matrix: MatrixLayout) -> _core.Matrix:
    """The description of a matrix for the C++ core."""

    def core_rows(rows: Rows) -> _core.Rows:
        return _core.Rows(rows.offset, rows.stride)

    def core_scales(rows: Rows, row: WeightFormat) -> _core.Scales:
        assert row.block is not None and row.scales is not None
        zeros = None if matrix.zeros is None else core_rows(matrix.zeros)
        return _core.Scales(core_rows(rows), SCALES[row.scales], *row.block, zeros)

    return _core.Matrix(
        format=matrix.format.name,
        rows=matrix.rows,
        cols=matrix.cols,
        values=core_rows(matrix.values),
        scales=None if matrix.scales is None else core_scales(matrix.scales, matrix.format),
        multiplier=None if matrix.multiplier is None else matrix.multiplier.offset,
        bias=None if matrix.bias is None else core_rows(matrix.bias),
        bias_dtype=DTYPES[torch.float32 if matrix.bias is None else matrix.bias.segment.dtype],
    )


class CpuExperts:
    """Computes experts out of the slots of one cache in RAM. Thread-safe.

    It keeps what it needs of the cache, not the cache, which ends it.
    """

    def __init__(self, cache: ExpertCache, engine: _core.CpuEngine | None = None):
        store = cache.store
        self.hidden = store.layout.hidden
        self.engine = engine or default_engine()
        self.core = cache.core
        self.passes = cache.passes
        self.scratch_bytes = cache.scratch_bytes
        self.expert = core_expert(store.form, store.layout)

    def run(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, layer: int) -> Tensor:
        """See `moeinf.fused_experts`."""
        check_tensors(hidden, topk_ids, topk_weights, self.hidden, device=HOST)
        if self.passes.observers:
            self.passes.observe(layer, topk_ids, topk_weights)
        marks = Marks()
        marks.begin("moeinf::acquire_and_compute")
        try:
            out = self._compute(
                hidden.contiguous(), topk_ids.contiguous(), topk_weights.contiguous(), layer
            )
        finally:
            marks.end()
        assert out is not None
        return out

    def run_plain(
        self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, layer: int
    ) -> Tensor | None:
        """The same with less time around the kernels. None, and nothing has happened, where tensors
        need `run`'s checks or changes, or where observers look at them."""
        if self.passes.observers:
            return None
        return self._compute(hidden, topk_ids, topk_weights, layer)

    def _compute(
        self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, layer: int
    ) -> Tensor | None:
        """In a decode step the weights drive torch and the interpreter out of the processor's
        caches: each operation on a tensor takes 10 us or more. So the core looks at the tensors."""
        passes = self.passes
        prefill, new_sequence, caller, batch = passes.of_step()
        out: Tensor | None = _core.fused_experts(
            self.core, self.engine, self.expert, hidden, topk_ids, topk_weights, layer, prefill,
            new_sequence, caller, batch, self.scratch_bytes,
        )  # fmt: skip
        if new_sequence and out is not None:
            passes.takes_first_step()
        return out
