"""Finds the form of an experts module of transformers by running it, not by its name.

`_apply_gate` of the module runs on a few hundred numbers, and the result is compared with each row
of the table of gate functions. So a new family with a known gate function needs no code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from moeinf.errors import UnsupportedError
from moeinf.kernels.forms import ExpertForm, Gate
from moeinf.kernels.gates import ACTIVATIONS, GATES, reference

# Modules may compute in float32 on the way: an answer may be off by this, relative to its inputs.
TOLERANCE = 1e-5
PROBES = 512


def form_of(module: Any, known: list[ExpertForm] | None = None) -> ExpertForm:
    """The form of this module's experts. `known` forms, of other layers, are tried first.

    Raises:
        UnsupportedError: no row of the table of gates gives what the module gives.
    """
    has_gate, has_bias = _flags(module)
    probe = _Probe(module)
    for form in known or ():
        if (form.has_gate, form.has_bias) == (has_gate, has_bias) and probe.answers_as(form.gate):
            return form
    for gate in _candidates(has_gate, probe.constants):
        if probe.answers_as(gate):
            form = ExpertForm(gate, has_gate, has_bias)
            if known is not None:
                known.append(form)
            return form
    raise UnsupportedError(
        f"{type(module).__name__}: its gate function is none of {', '.join(GATES)}; to serve it, "
        "add a row to GATES in kernels/gates.py and in csrc/cpu_kernels/gates.h"
    )


def _flags(module: Any) -> tuple[bool, bool]:
    """has_gate and has_bias; transformers 5.0 has not all of these attributes."""
    return getattr(module, "has_gate", True), getattr(module, "has_bias", False)


class _Probe:
    """The module's answer to numbers that reach beyond each limit it might have."""

    def __init__(self, module: Any):
        self.constants = sorted(set(_numbers(module)))
        reach = 2 * max(self.constants, default=1.0)
        draw = torch.Generator("cpu").manual_seed(0)
        # Small and large numbers alike: the exponent is drawn, then the sign.
        size = torch.rand(2, PROBES, dtype=torch.float64, generator=draw, device="cpu")
        size = 0.05 * (max(reach, 20.0) / 0.05) ** size
        sign = torch.randint(0, 2, (2, PROBES), generator=draw, device="cpu") * 2 - 1
        self.g, self.u = size * sign
        with torch.no_grad():
            if not getattr(module, "has_gate", True):
                self.answer = module.act_fn(self.g[None])[0]
            elif getattr(module, "is_concatenated", True):
                self.answer = module._apply_gate(torch.cat([self.g, self.u])[None])[0]
            else:
                self.answer = module._apply_gate(torch.stack([self.g, self.u], 1).reshape(1, -1))[0]

    def answers_as(self, gate: Gate) -> bool:
        up = self.u if GATES[gate.function].has_up else None
        expected = reference(gate, self.g, up)
        if self.answer.shape != expected.shape:
            return False
        scale = (1 + self.g.abs()) * (1 + self.u.abs()) + expected.abs()
        # NaN never agrees.
        return bool(((self.answer - expected).abs() <= TOLERANCE * scale).all())


def _candidates(has_gate: bool, constants: list[float]) -> Iterator[Gate]:
    """Every gate that the module might have, those with fewer constants first."""
    rows = [(name, row) for name, row in GATES.items() if row.has_up == has_gate]
    for name, row in sorted(rows, key=lambda item: len(item[1].constants)):
        for activation in ACTIVATIONS if "activation" in row.constants else ("silu",):
            for alpha in constants if "alpha" in row.constants else (1.0,):
                for limit in constants if "limit" in row.constants else (float("inf"),):
                    yield Gate(name, activation, alpha, limit)


def _numbers(module: torch.nn.Module) -> Iterator[float]:
    """The positive numbers among the attributes of a module and of what it is made of."""
    for part in module.modules():
        for value in vars(part).values():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and 0 < value < float("inf"):
                yield float(value)
