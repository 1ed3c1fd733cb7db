"""What the kernels compute, in plain PyTorch and float32, with the signature of `experts`.

For users who want to read or check the arithmetic; runs on any device, slowly. The kernels' tests
do not use it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def experts_reference(
    hidden: torch.Tensor,
    slot_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    expert_map: torch.Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> torch.Tensor:
    """[T, H] in the dtype of `hidden`; arguments as for `experts.experts`, ids not checked."""
    slots = slot_ids.long()
    if expert_map is not None:
        slots = torch.where(slots < 0, -1, expert_map.long()[slots.clamp(min=0)])
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for t, j in (slots >= 0).nonzero().tolist():
        s = slots[t, j]
        up, low = gate_up[s].float(), down[s].float()
        if transposed:
            up, low = up.t(), low.t()
        rows = up @ hidden[t].float()
        if gate_up_bias is not None:
            rows = rows + gate_up_bias[s].float()
        y = low @ gate(rows, activation, gated, interleaved, alpha, limit)
        if down_bias is not None:
            y = y + down_bias[s].float()
        out[t] += topk_weights[t, j].float() * y
    return out.to(hidden.dtype)


def gate(
    rows: torch.Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    """[N] float32 -> [I]: splits gate from up and applies the activation."""
    if not gated:
        gate, up = rows, torch.ones_like(rows)
    elif interleaved:
        gate, up = rows[0::2], rows[1::2]
    else:
        gate, up = rows.chunk(2)
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if activation == "relu2":
        return F.relu(gate).square() * up
    if activation == "gelu":
        return F.gelu(gate) * up
    return (F.silu(gate) if activation == "silu" else F.relu(gate)) * up
