"""Decoder layers on the CPU: the sum after the attention and the norm after it in one call.

The rest of a layer's forward stays the model's own; see `OwnForward`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from moeinf import _core
from moeinf.experts.cpu import default_engine
from moeinf.experts.marks import hooks_everywhere, is_plain_call
from moeinf.integrations.transformers.own_source import (
    Function,
    OwnForward,
    is_own,
    served_class,
)

NORM = "post_attention_layernorm"
STATEMENTS = (
    "hidden_states = residual + hidden_states",
    "residual = hidden_states",
    f"hidden_states = self.{NORM}(hidden_states)",
)


class _Layer:
    """A base of the classes of decoder layers that are served."""

    def forward(self: Any, hidden_states: Any, *others: Any, **named: Any) -> Any:
        """As the model's own; see `OwnForward`."""
        if is_plain_call(hidden_states) and is_own(self):
            return self.moeinf_rest(hidden_states, *others, **named)
        return super().forward(hidden_states, *others, **named)  # type: ignore[misc]

    def moeinf_add(self: Any, residual: Any, hidden: Any) -> Any:
        """The sum, and its norm."""
        norm = self._modules[NORM]
        if type(residual) is type(hidden) is torch.Tensor and not hooks_everywhere():
            made = _core.add_rms_norm(
                default_engine(), self.moeinf_normed_by, norm, residual, hidden
            )
            if made is not None:
                return made
        total = residual + hidden
        return total, norm(total)


def serve_residuals(model: torch.nn.Module) -> None:
    """Serves every layer whose statements are known and whose norm is served.

    Parameters, hooks and names stay.
    """
    for module in model.modules():
        kind: Any = type(module)
        norm = module._modules.get(NORM)
        if not hasattr(norm, "moeinf_norm") or (rest := _rest(kind, kind.forward)) is None:
            continue
        module.moeinf_normed_by = type(norm)  # type: ignore[assignment]
        module.__class__ = served_class(_Layer, kind, rest)


@cache
def _rest(base: type, forward: Function) -> Function | None:
    """The forward with one call in the place of the sum and the norm."""
    try:
        own = OwnForward(base)
    except ValueError:
        return None
    at = own.find(STATEMENTS)
    if at < 0:
        return None
    made = "residual, hidden_states = self.moeinf_add(residual, hidden_states)"
    return own.with_body([*own.body[:at], made, *own.body[at + len(STATEMENTS) :]])
