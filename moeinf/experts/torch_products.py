"""Expert FFNs out of slot views by torch products: for devices without Triton, and for tests.

Works like the Triton kernels: each wave of experts writes the outputs of its routes, and a sum in
the order of the router follows. Slow, because it reads the map back to the host.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from moeinf.checkpoint.formats import FORMATS, MULTIPLIER, SCALES, VALUES, ZEROS
from moeinf.kernels.forms import ExpertForm, ExpertMatrices, Matrix
from moeinf.kernels.gates import reference


def expert_routes(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    matrices: ExpertMatrices,
    form: ExpertForm,
    *,
    expert_map: torch.Tensor,
    routes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes routes[t, j] [T, k, H], float32, for every route whose expert has a slot in the map.

    hidden [T, H], ids [T, k] experts or -1, expert_map [E] expert -> slot or -1. The tokens of an
    expert are one product, in whatever wave it comes.
    """
    if routes is None:
        shape = (*ids.shape, hidden.shape[1])
        routes = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    for expert, slot in enumerate(expert_map.tolist()):
        if slot < 0:
            continue
        token, place = (ids == expert).nonzero(as_tuple=True)
        gate, up = matrices.gate, matrices.up
        first = product(hidden[token].float(), [gate] if up is None else [gate, up], slot)
        inner = reference(form.gate, *first.split(gate.values.shape[1], dim=1))
        routes[token, place] = product(inner, [matrices.down], slot)
    return routes


def product(x: torch.Tensor, matrices: list[Matrix], slot: int) -> torch.Tensor:
    """x W^T + bias in float32, of one slot, for the rows of all matrices as one product."""
    weights, biases = [], []
    for matrix in matrices:
        row = replace(
            FORMATS[matrix.format],
            block=matrix.block,
            multiplier=matrix.multiplier is not None,
            zeros=matrix.zeros is not None,
        )
        pieces = {
            VALUES: matrix.values,
            SCALES: matrix.scales,
            ZEROS: matrix.zeros,
            MULTIPLIER: matrix.multiplier,
        }
        parts = {name: piece[slot] for name, piece in pieces.items() if piece is not None}
        weights.append(row.dequantise(parts).float())
        if matrix.bias is not None:
            biases.append(matrix.bias[slot].float())
    return F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)


def combine(
    routes: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor, *, dtype: torch.dtype
) -> torch.Tensor:
    """out[t] = sum over j, in order, of topk_weights[t, j] * routes[t, j]; -1 adds nothing."""
    out = torch.zeros_like(routes[:, 0])
    for j in range(ids.shape[1]):
        scaled = topk_weights[:, j, None].float() * routes[:, j]
        out += torch.where(ids[:, j, None] >= 0, scaled, 0)
    return out.to(dtype)
