"""Every gate function and activation for one pair of numbers, with the math module alone."""

from __future__ import annotations

import math
from typing import Any


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def activation_value(name: str, x: float) -> float:
    return {
        "silu": lambda: x * sigmoid(x),
        "gelu": lambda: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda: (
            0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        ),
        "relu": lambda: max(x, 0.0),
        "relu2": lambda: max(x, 0.0) ** 2,
    }[name]()


def gate_value(gate: Any, g: float, u: float) -> float:
    """`gate` is a Gate; u is not looked at where the function has no up."""

    def act(x: float) -> float:
        return activation_value(gate.activation, x)

    alpha, limit = gate.alpha, gate.limit
    low, clamped = min(g, limit), max(-limit, min(u, limit))
    return {
        "glu": lambda: act(g) * u,
        "plain": lambda: act(g),
        "swiglu_oai": lambda: (clamped + 1) * (low * sigmoid(alpha * low)),
        "clamped_glu": lambda: act(low) * clamped,
        "glu_clamped": lambda: min(act(g), limit) * clamped,
        "softcap_swiglu": lambda: (
            alpha * math.tanh(g / alpha) * sigmoid(g) * limit * math.tanh(u / limit)
        ),
    }[gate.function]()
