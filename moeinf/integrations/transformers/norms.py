"""Root mean square norms of a model on the CPU, in one call each.

As operators of torch a norm is seven of them: in a decode step, whose weights drive torch out of
the processor's caches, over 100 us. A norm is replaced only where a trial gives the same bits, in
32-bit floats, which show the order of the sum, and in bf16, which shows what is rounded.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from moeinf import _core
from moeinf.experts.cpu import default_engine
from moeinf.experts.marks import is_plain_call
from moeinf.integrations.transformers.whole import class_of

EPSILONS = ("variance_epsilon", "eps", "epsilon")
# What is added to the weight, and whether the norm is rounded before it is scaled.
KINDS = ((0.0, True), (0.0, False), (1.0, False))
TRIAL = (9, 5)  # tokens


class _Norm:
    """A base of the classes of norms that are served."""

    def forward(self: Any, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        if not others and not named and is_plain_call(x):
            epsilon, kind = self.moeinf_norm
            norm = _norm(getattr(self, epsilon), *kind)
            out: torch.Tensor | None = _core.rms_norm(default_engine(), norm, x, self.weight)
            if out is not None:
                return out
        result: torch.Tensor = super().forward(x, *others, **named)  # type: ignore[misc]
        return result


def serve_norms(model: torch.nn.Module) -> None:
    """Serves every norm of which a trial has the same bits. Parameters, hooks and names stay."""
    known: dict[Any, tuple[float, bool] | None] = {}
    for module in model.modules():
        weight = _weight(module)
        if weight is None:
            continue
        epsilon = _epsilon(module)
        key = type(module), tuple(weight.shape), weight.dtype, getattr(module, epsilon)
        if key not in known:
            known[key] = _find(module, weight, getattr(module, epsilon))
        if (kind := known[key]) is not None:
            module.moeinf_norm = epsilon, kind  # type: ignore[assignment]
            module.__class__ = class_of(_Norm, type(module))


@cache
def _norm(epsilon: float, offset: float, rounds_first: bool) -> _core.RmsNorm:
    """Not a part of the module, for modules are copied."""
    return _core.RmsNorm(epsilon, offset, rounds_first)


def _weight(module: torch.nn.Module) -> torch.Tensor | None:
    """The weight of a module that may be such a norm."""
    names = [name for name, _ in module.named_parameters()]
    if "RMSNorm" not in type(module).__name__ or names != ["weight"] or not _epsilon(module):
        return None
    weight = module.get_parameter("weight")
    is_row = weight.dim() == 1 and weight.is_cpu and not module._forward_hooks
    return weight if is_row and not any(True for _ in module.buffers()) else None


def _epsilon(module: Any) -> str:
    """The name of the attribute; "" where there is none."""
    return next((name for name in EPSILONS if type(getattr(module, name, None)) is float), "")


def _find(module: Any, weight: torch.Tensor, epsilon: float) -> tuple[float, bool] | None:
    """The kind of norm that has the same bits as the module for random numbers of any size, also
    after the module has become bf16: in 32-bit floats two kinds are alike."""
    draw = torch.Generator("cpu").manual_seed(0)
    width = len(weight)
    x = torch.randn(*TRIAL, width, generator=draw, device="cpu", dtype=torch.float32)
    x *= torch.rand(*TRIAL, 1, generator=draw, device="cpu", dtype=torch.float32) * 8
    scales = torch.randn(width, generator=draw, device="cpu", dtype=torch.float32)
    dtypes = {torch.float32, torch.bfloat16, weight.dtype}
    for kind in KINDS:
        norm = _norm(epsilon, *kind)
        if all(_is_same(module, norm, x.to(dtype), scales.to(dtype)) for dtype in dtypes):
            return kind
    return None


def _is_same(module: Any, norm: _core.RmsNorm, x: torch.Tensor, weight: torch.Tensor) -> bool:
    with torch.no_grad():
        found = _core.rms_norm(default_engine(), norm, x, weight)
        try:
            expected = torch.func.functional_call(module, {"weight": weight}, (x,))
        except (TypeError, ValueError, AttributeError, RuntimeError):
            return False
    return found is not None and isinstance(expected, torch.Tensor) and same_bits(found, expected)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of tensors of 16 or 32 bits."""
    integers = torch.int16 if one.element_size() == 2 else torch.int32
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(one.view(integers), other.contiguous().view(integers))
