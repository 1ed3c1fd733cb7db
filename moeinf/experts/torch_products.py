"""Expert FFNs out of slot views by torch products: for devices without Triton, and for tests.

Same division of labour as the Triton kernels: one wave of experts at a time writes the outputs of
its routes, and a sum in the order of the router follows. Slow: it reads the map back to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def expert_routes(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    expert_map: torch.Tensor,
    activation: str,
    routes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes routes[t, j] [T, k, H], float32, for every route whose expert has a row in the map.

    hidden [T, H], ids [T, k] experts or -1, gate_up [S, 2I, H], down [S, H, I], expert_map [E]
    expert -> row or -1. An expert's tokens are one product each, whatever the wave it comes in.
    """
    if routes is None:
        shape = (*ids.shape, hidden.shape[1])
        routes = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    act = ACTIVATIONS[activation]
    for expert, row in enumerate(expert_map.tolist()):
        if row < 0:
            continue
        token, place = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(hidden[token].float(), gate_up[row].float()).chunk(2, dim=1)
        routes[token, place] = F.linear(act(gate) * up, down[row].float())
    return routes


def combine(
    routes: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor, *, dtype: torch.dtype
) -> torch.Tensor:
    """out[t] = sum over j, in order, of topk_weights[t, j] * routes[t, j]; -1 adds nothing."""
    out = torch.zeros_like(routes[:, 0])
    for j in range(ids.shape[1]):
        scaled = topk_weights[:, j, None].float() * routes[:, j]
        out += torch.where(ids[:, j, None] >= 0, scaled, 0)
    return out.to(dtype)
