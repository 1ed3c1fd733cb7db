"""Checks of the tensors that every backend takes."""

from __future__ import annotations

import torch

from moeinf import _core
from moeinf.errors import UnsupportedError

# Of tokens, outputs and biases. Weight formats are in moeinf.checkpoint.formats.
DTYPES = {
    torch.bfloat16: _core.DType.bf16,
    torch.float16: _core.DType.f16,
    torch.float32: _core.DType.f32,
}

FLOATS, INTEGERS = tuple(DTYPES), (torch.int64, torch.int32)


def check_tensors(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    width: int,
    *,
    device: torch.device,
) -> None:
    """Checks the tensors whose addresses the core reads."""
    for name, tensor, dtypes in (
        ("hidden", hidden, FLOATS),
        ("topk_ids", topk_ids, INTEGERS),
        ("topk_weights", topk_weights, FLOATS),
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
    shape = hidden.shape
    if shape[1] != width:
        raise ValueError(f"hidden: expected [T, {width}], found {list(shape)}")
    routes = topk_ids.shape
    if routes[0] != shape[0] or topk_weights.shape != routes:
        raise ValueError(
            f"topk_ids and topk_weights: expected [{shape[0]}, k] both, found "
            f"{list(routes)} and {list(topk_weights.shape)}"
        )


MOST_ROUTES = {"cpu": 64, "cuda": 32}
"""Of a token: what the kernels take."""


def check_routes(top_k: int | None, device: str, where: object) -> None:
    """Raises UnsupportedError for more routes per token than the kernels of the device take."""
    if top_k is not None and top_k > MOST_ROUTES[device]:
        raise UnsupportedError(
            f"{where}: {top_k} experts per token: the {device} kernels take up to "
            f"{MOST_ROUTES[device]}"
        )
