"""What an expert computes, and the views that kernels compute it from.

The same objects describe an expert on every device: a store carries them, and the operator for the
CPU, the Triton kernels and the tests' references all take them. Nothing here launches anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class Gate:
    """How the outputs of gate and up become one value: a row of the table of gate functions.

    | function | value | constants |
    |---|---|---|
    | glu | act(g) * u | |
    | plain | act(g), no up | |
    | swiglu_oai | (clamp(u) + 1) * m * sigmoid(alpha * m) with m = min(g, limit) | both |
    | clamped_glu | act(min(g, limit)) * clamp(u) | limit |
    | glu_clamped | min(act(g), limit) * clamp(u) | limit |
    | softcap_swiglu | alpha tanh(g / alpha) * sigmoid(g) * limit tanh(u / limit) | both |

    clamp(u) lies between -limit and limit. `activation` is act, one of ACTIVATIONS; the functions
    whose name says swiglu bring their own and want "silu".
    """

    function: str = "glu"
    activation: str = "silu"
    alpha: float = 1.0
    limit: float = float("inf")


@dataclass(frozen=True)
class ExpertForm:
    """down(gate(gate_proj(x), up_proj(x))), in the words of transformers' experts interface.

    `has_gate` False: there is no up; the one matrix before the activation is called gate.
    """

    gate: Gate = field(default_factory=Gate)
    has_gate: bool = True
    has_bias: bool = False


@dataclass(frozen=True)
class Matrix:
    """One matrix of every slot of a pool, as strided views: S slots, N rows (outputs), K columns.

    values  [S, N, K] for formats with one element per value; any strides. Packed formats: the
            bytes of a row in the last dimension.
    scales  [S, ...] as the format wants them, or None
    bias    [S, N], or None
    format  name of the weight format, a row of moeinf/checkpoint/formats.py
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    format: str = "bf16"


@dataclass(frozen=True)
class ExpertMatrices:
    """gate [S, I, H], up [S, I, H] or None where the form has no gate, down [S, H, I]."""

    gate: Matrix
    up: Matrix | None
    down: Matrix
