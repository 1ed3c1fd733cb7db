"""What an expert computes, and the views that kernels compute it from.

The same objects describe an expert on every device: a store carries them, and the operator for the
CPU, the Triton kernels and the tests' references all take them. Needs torch alone. Nothing here
checks values or launches anything: `gates.check_form` and `checks.py` do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

# Weight formats with one element per value and no scales, by the dtype of their elements.
PLAIN_FORMATS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@dataclass(frozen=True)
class Gate:
    """How the outputs of gate and up become one value: a row of the table `gates.GATES`.

    | function | value, of g from gate and u from up | constants |
    |---|---|---|
    | glu | act(g) * u | |
    | plain | act(g); there is no up | |
    | swiglu_oai | (clamp(u) + 1) * m * sigmoid(alpha * m) with m = min(g, limit) | both |
    | clamped_glu | act(min(g, limit)) * clamp(u) | limit |
    | glu_clamped | min(act(g), limit) * clamp(u) | limit |
    | softcap_swiglu | alpha * tanh(g / alpha) * sigmoid(g) * limit * tanh(u / limit) | both |

    clamp(u) lies between -limit and limit. `activation` names act, one of `gates.ACTIVATIONS`.
    swiglu_oai and softcap_swiglu use no act: their activation stays "silu".
    """

    function: str = "glu"
    activation: str = "silu"
    alpha: float = 1.0
    limit: float = float("inf")


@dataclass(frozen=True)
class ExpertForm:
    """down(gate(gate_proj(x), up_proj(x))), in the words of transformers' experts interface.

    `has_gate` False: there is no up, and the gate function is plain. The one matrix before the
    activation is then called gate. `has_bias`: gate, up and down each have a bias.
    """

    gate: Gate = field(default_factory=Gate)
    has_gate: bool = True
    has_bias: bool = False


@dataclass(frozen=True)
class Matrix:
    """One matrix of every slot of a pool, as strided views: S slots, N rows (outputs), K columns.

    values  [S, N, K] for formats with one element per value; any strides. Packed formats: the
            bytes of a row in the last dimension.
    scales  [S, rows of blocks, blocks in a row], or None. Bytes are exponents of powers of two
    bias    [S, N], any strides, or None
    format  name of the weight format: a row of moeinf/checkpoint/formats.py and of `formats.py`
    block   rows and columns that share a scale; 0 columns are all columns
    multiplier  [S] float32, any stride: one more scale for all of a slot's matrix, or None
    zeros   int8, of the shape of the scales, or None: subtracted from stored integers before they
            are scaled. In a slot it lies as the scales do: the strides of rows and columns are the
            same in elements, that of slots in bytes
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    format: str = "bf16"
    block: tuple[int, int] | None = None
    multiplier: torch.Tensor | None = None
    zeros: torch.Tensor | None = None


@dataclass(frozen=True)
class ExpertMatrices:
    """gate [S, I, H], up [S, I, H] or None where the form has no gate, down [S, H, I]."""

    gate: Matrix
    up: Matrix | None
    down: Matrix

    @cached_property
    def up_is_as_gate(self) -> bool:
        """Whether one set of strides and constants serves both; not so where there is no up."""

        def kind(matrix: Matrix) -> tuple[object, ...]:
            scales = matrix.scales
            of_scales = None if scales is None else (scales.dtype, scales.stride())
            return matrix.format, matrix.block, matrix.values.stride(), of_scales

        return self.up is not None and kind(self.up) == kind(self.gate)

    @cached_property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The values of gate, up and down, then the other parts in this order; None if absent.

        Floats of eight bits are bytes here: not every GPU knows them.
        """
        every = (self.gate, self.up, self.down)
        found = (
            None if matrix is None else getattr(matrix, part)
            for part in ("values", "scales", "zeros", "multiplier", "bias")
            for matrix in every
        )
        return tuple(
            tensor.view(torch.uint8)
            if tensor is not None and tensor.dtype == torch.float8_e4m3fn
            else tensor
            for tensor in found
        )

    @classmethod
    def of_fused(
        cls,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        *,
        has_gate: bool = True,
        interleaved: bool = False,
        transposed: bool = False,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
    ) -> ExpertMatrices:
        """The matrices inside fused tensors, as views of them: plain formats only.

        gate_up is [S, 2I, H], with gate before up or, if `interleaved`, gate and up row by row in
        turn; [S, I, H] if not `has_gate`. down is [S, H, I]. `transposed`: both are stored with
        their last two dimensions exchanged. The biases are [S, 2I] (or [S, I]) and [S, H].
        """
        if transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)

        def matrix(values: torch.Tensor, bias: torch.Tensor | None, rows: slice) -> Matrix:
            if values.dtype not in PLAIN_FORMATS:
                raise TypeError(
                    f"weights: expected one of {list(PLAIN_FORMATS)}, found {values.dtype}"
                )
            bias = None if bias is None else bias[:, rows]
            return Matrix(values[:, rows], None, bias, PLAIN_FORMATS[values.dtype])

        every, half = slice(None), gate_up.shape[1] // 2
        gate, up = (slice(0, half), slice(half, None)) if has_gate else (every, every)
        if has_gate and interleaved:
            gate, up = slice(0, None, 2), slice(1, None, 2)
        return cls(
            matrix(gate_up, gate_up_bias, gate),
            matrix(gate_up, gate_up_bias, up) if has_gate else None,
            matrix(down, down_bias, every),
        )
