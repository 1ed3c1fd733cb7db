"""The CPU half of `fused_experts`: checks tensors, and hands their addresses to the C++ kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from moeinf import _core
from moeinf.checkpoint.layout import Layout, MatrixLayout, Rows
from moeinf.checkpoint.store import ExpertStore
from moeinf.kernels.forms import ExpertForm

# Of tokens, outputs and biases; how weights are stored is moeinf.checkpoint.formats.
DTYPES = {
    torch.bfloat16: _core.DType.bf16,
    torch.float16: _core.DType.f16,
    torch.float32: _core.DType.f32,
}


@lru_cache(maxsize=1)
def default_engine() -> _core.CpuEngine:
    """The process's engine: the best instruction set, as many threads as torch uses."""
    return _core.CpuEngine(threads=torch.get_num_threads())


def core_expert(form: ExpertForm, layout: Layout) -> _core.ExpertFfn:
    """What the C++ core must know of an expert."""
    gate = form.gate
    return _core.ExpertFfn(
        gate=_core_matrix(layout.gate),
        up=None if layout.up is None else _core_matrix(layout.up),
        down=_core_matrix(layout.down),
        function=_core.Gate(gate.function, gate.activation, alpha=gate.alpha, limit=gate.limit),
    )


def _core_matrix(matrix: MatrixLayout) -> _core.Matrix:
    def core_rows(rows: Rows | None) -> _core.Rows | None:
        return None if rows is None else _core.Rows(rows.offset, rows.stride)

    return _core.Matrix(
        format=matrix.format.name,
        rows=matrix.rows,
        cols=matrix.cols,
        values=core_rows(matrix.values),
        scales=core_rows(matrix.scales),
        bias=core_rows(matrix.bias),
        bias_dtype=DTYPES[torch.float32 if matrix.bias is None else matrix.bias.segment.dtype],
    )


class CpuExperts:
    """Computes the experts of one store out of a cache's slots."""

    def __init__(
        self, store: ExpertStore, core: _core.ExpertCache, engine: _core.CpuEngine | None = None
    ):
        self.hidden = store.layout.hidden
        self.num_experts = store.num_experts
        self.engine = engine or default_engine()
        self.core = core
        self.expert = core_expert(store.form, store.layout)

    def run(
        self,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        layer: int,
        *,
        prefill: bool = False,
        new_sequence: bool = False,
        on_ids: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """See `moeinf.fused_experts`; `prefill` and `new_sequence` are for policies and traces, and
        `on_ids` is given the ids."""
        check_tensors(hidden, topk_ids, topk_weights, self.hidden, device=torch.device("cpu"))
        if on_ids is not None:
            on_ids(topk_ids)
        hidden = hidden.contiguous()
        topk_ids = topk_ids.contiguous()
        topk_weights = topk_weights.contiguous()
        out = torch.empty_like(hidden)
        _core.fused_experts(
            self.core,
            self.engine,
            self.expert,
            _core.FfnInput(
                hidden=hidden.data_ptr(),
                hidden_dtype=DTYPES[hidden.dtype],
                topk_ids=topk_ids.data_ptr(),
                ids_are_int64=topk_ids.dtype == torch.int64,
                topk_weights=topk_weights.data_ptr(),
                topk_weights_dtype=DTYPES[topk_weights.dtype],
                tokens=hidden.shape[0],
                top_k=topk_ids.shape[1],
                num_experts=self.num_experts,
            ),
            layer=layer,
            out=out.data_ptr(),
            out_dtype=DTYPES[hidden.dtype],
            prefill=prefill,
            new_sequence=new_sequence,
        )
        return out


def check_tensors(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    width: int,
    *,
    device: torch.device,
) -> None:
    """What the addresses that go to the core must point to."""
    for name, tensor, dtypes in (
        ("hidden", hidden, tuple(DTYPES)),
        ("topk_ids", topk_ids, (torch.int64, torch.int32)),
        ("topk_weights", topk_weights, tuple(DTYPES)),
    ):
        if tensor.dim() != 2:
            raise ValueError(f"{name}: expected 2 dimensions, found {list(tensor.shape)}")
        if tensor.dtype not in dtypes:
            expected = ", ".join(str(dtype)[6:] for dtype in dtypes)
            raise ValueError(f"{name}: expected {expected}, found {str(tensor.dtype)[6:]}")
        if tensor.device != device:
            raise ValueError(
                f"{name}: expected a tensor on {device}, where the cache is, found {tensor.device}"
            )
    if hidden.shape[1] != width:
        raise ValueError(f"hidden: expected [T, {width}], found {list(hidden.shape)}")
    expected_shape = (hidden.shape[0], topk_ids.shape[1])
    if topk_ids.shape != expected_shape or topk_weights.shape != expected_shape:
        raise ValueError(
            f"topk_ids and topk_weights: expected [{hidden.shape[0]}, k] both, found "
            f"{list(topk_ids.shape)} and {list(topk_weights.shape)}"
        )
