# mypy: ignore-errors
"""The gate functions between the two products: one table for kernels, references and probes.

A new gate function is one row of `GATES` and one line in `apply_gate`; for the CPU, one row in
csrc/cpu_kernels/gates.h. A new activation is one row of `ACTIVATIONS` and one line in `activate`. A
test holds each Triton line against its torch line. The torch lines need no Triton: `reference`
works where it is not installed, in any floating dtype, and a runtime's module is recognised by it.

Gate and up arrive in float32 in every kernel, so Beam's variant, which converts both to float32
first, is `glu`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .forms import ExpertForm, Gate

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    KEEP_NAN: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)  # of a token: it stays NaN
except ImportError:

    def jit(function):
        """Without Triton the device functions below are defined and never called."""
        return function


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class GateFunction:
    """One row: the value in torch, from act (the activation), g, u (None without up) and the gate.

    `constants` are the fields of `Gate` that the value depends on. `models` says who uses it.
    """

    reference: Callable[..., torch.Tensor]
    constants: tuple[str, ...] = ("activation",)
    has_up: bool = True
    models: str = ""


GATES: dict[str, GateFunction] = {
    "glu": GateFunction(
        lambda act, g, u, gate: act(g) * u,
        models="most",
    ),
    "plain": GateFunction(
        lambda act, g, u, gate: act(g),
        has_up=False,
        models="Nemotron-H (relu2), Switch and NLLB (relu)",
    ),
    "swiglu_oai": GateFunction(
        lambda act, g, u, gate: (
            (u.clamp(-gate.limit, gate.limit) + 1)
            * g.clamp(max=gate.limit)
            * torch.sigmoid(gate.alpha * g.clamp(max=gate.limit))
        ),
        ("alpha", "limit"),
        models="GPT-OSS, MiniMax-M3",
    ),
    "clamped_glu": GateFunction(
        lambda act, g, u, gate: act(g.clamp(max=gate.limit)) * u.clamp(-gate.limit, gate.limit),
        ("activation", "limit"),
        models="DeepSeek-V4, HY-V4, GLM-5-Next",
    ),
    "glu_clamped": GateFunction(
        lambda act, g, u, gate: act(g).clamp(max=gate.limit) * u.clamp(-gate.limit, gate.limit),
        ("activation", "limit"),
        models="Step-3.7",
    ),
    "softcap_swiglu": GateFunction(
        lambda act, g, u, gate: (
            (torch.tanh(g / gate.alpha) * gate.alpha)
            * torch.sigmoid(g)
            * (torch.tanh(u / gate.limit) * gate.limit)
        ),
        ("alpha", "limit"),
        models="Inkling2",
    ),
}


def reference(gate: Gate, g: torch.Tensor, u: torch.Tensor | None = None) -> torch.Tensor:
    """The gate's value in torch, element by element, in the dtype of `g`; u is None without up."""
    return GATES[gate.function].reference(ACTIVATIONS[gate.activation], g, u, gate)


def check_form(form: ExpertForm) -> None:
    """Raises ValueError where a name is in no table, or the parts of the form contradict."""
    gate = form.gate
    for what, name, table in (
        ("gate function", gate.function, GATES),
        ("activation", gate.activation, ACTIVATIONS),
    ):
        if name not in table:
            raise ValueError(f"{what}: expected one of {', '.join(table)}, found {name!r}")
    row = GATES[gate.function]
    if row.has_up != form.has_gate:
        raise ValueError(
            f"gate function {gate.function!r}: expected has_gate={row.has_up}, "
            f"found {form.has_gate}"
        )
    if "activation" not in row.constants and gate.activation != "silu":
        raise ValueError(
            f"gate function {gate.function!r} uses no activation: expected 'silu', "
            f"found {gate.activation!r}"
        )
    for name in ("alpha", "limit"):
        found = getattr(gate, name)
        # An infinite limit clamps nothing; as a divisor it gives NaN.
        finite = name == "alpha" or gate.function == "softcap_swiglu"
        if name in row.constants and not (found > 0 and (math.isfinite(found) or not finite)):
            raise ValueError(
                f"gate function {gate.function!r}: expected a {'finite ' if finite else ''}{name} "
                f"above 0, found {found}"
            )


@jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def tanh(x):
    """To 2 units in the last place; Triton has none that its interpreter can run.

    Near 0, where 1 - 2 / (e^2x + 1) would cancel, the polynomial of the Cephes library.
    """
    z = x * x
    near = -5.70498872745e-3
    near = near * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    near = near * z * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, far)


@jit
def clamp(x, limit):
    return tl.minimum(tl.maximum(x, -limit, KEEP_NAN), limit, KEEP_NAN)


@jit
def activate(x, ACTIVATION: tl.constexpr):
    """The row of ACTIVATIONS with this name, for float32 of any shape."""
    if ACTIVATION == "silu":
        value = x * sigmoid(x)
    elif ACTIVATION == "gelu":
        value = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) is sigmoid(2z).
        value = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        value = tl.maximum(x, 0.0, KEEP_NAN)
    else:
        tl.static_assert(ACTIVATION == "relu2", "activation: no such row")
        value = tl.maximum(x, 0.0, KEEP_NAN)
        value = value * value
    return value


@jit
def apply_gate(g, u, alpha, limit, FUNCTION: tl.constexpr, ACTIVATION: tl.constexpr):
    """The row of GATES with this name, for float32 of any shape; `u` is unused without up."""
    if FUNCTION == "glu":
        value = activate(g, ACTIVATION) * u
    elif FUNCTION == "plain":
        value = activate(g, ACTIVATION)
    elif FUNCTION == "swiglu_oai":
        g = tl.minimum(g, limit, KEEP_NAN)
        value = g * sigmoid(g * alpha) * (clamp(u, limit) + 1.0)
    elif FUNCTION == "clamped_glu":
        value = activate(tl.minimum(g, limit, KEEP_NAN), ACTIVATION) * clamp(u, limit)
    elif FUNCTION == "glu_clamped":
        value = tl.minimum(activate(g, ACTIVATION), limit, KEEP_NAN) * clamp(u, limit)
    else:
        tl.static_assert(FUNCTION == "softcap_swiglu", "gate function: no such row")
        value = (tanh(g / alpha) * alpha) * sigmoid(g) * (tanh(u / limit) * limit)
    return value
