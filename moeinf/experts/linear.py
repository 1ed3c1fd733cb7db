"""A linear layer over a few tokens on the CPU, as a torch operator.

    y[t] = weight @ x[t] + bias

A decode step reads every weight once, so its limit is the speed of memory. The operator computes on
the threads of the experts, with their kernels: torch's own threads then have nothing to do in such
a step, and do not spin on the cores that the experts need. The result of a token has the same bits
for every number of threads, and for every number of tokens that go through the kernels. More tokens
go to torch, and so does everything that the kernels do not take.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.autograd import forward_ad
from torch.nn.functional import linear as torch_linear

from moeinf import _core
from moeinf.experts.cpu import default_engine
from moeinf.experts.marks import is_plain, is_plain_call

_library = torch.library.Library("moeinf", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_operator = torch.ops.moeinf.linear.default


def _has_amx() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# The most tokens of a call. Where the processor multiplies tiles of bf16, torch is faster from
# eight tokens on.
MOST_TOKENS = _core.LINEAR_TOKENS
MOST_OF_BF16 = 4 if _has_amx() else MOST_TOKENS


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Like `torch.nn.functional.linear`.

    Args:
        x: [..., K]. Up to sixteen tokens of float32, bfloat16 or float16 on the CPU, whose rows are
            contiguous, take the kernels of the experts; four of bfloat16 where the processor has
            AMX.
        weight: [N, K], in rows of elements beside each other.
        bias: [N].

    Returns:
        [..., N]. Where a gradient is wanted, or a type of tensor has products of its own, torch
        computes it.
    """
    if is_plain_call(x, weight):
        return _linear(x, weight, bias)
    if not torch.compiler.is_compiling() and (
        not is_plain(x, weight)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return torch_linear(x, weight, bias)
    return _operator(x, weight, bias)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    engine = default_engine()
    out: torch.Tensor | None = _core.linear(
        engine, x, weight, bias, None, MOST_TOKENS, MOST_OF_BF16
    )
    if out is None and x.dim() and 0 < x.numel() <= MOST_TOKENS * x.shape[-1]:  # gaps, maybe
        bias = None if bias is None else bias.contiguous()
        out = _core.linear(engine, x.contiguous(), weight, bias, None, MOST_TOKENS, MOST_OF_BF16)
    return torch_linear(x, weight, bias) if out is None else out


def _differentiated(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if torch.is_grad_enabled() and any(
        one is not None and one.requires_grad for one in (x, weight, bias)
    ):
        return torch_linear(x, weight, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(x, weight, bias)


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = torch_linear(x, weight, bias)
    return y.new_empty(y.shape)  # contiguous


_library.impl("linear", _linear, "CPU")
_library.impl("linear", torch_linear, "CUDA")
_library.impl("linear", torch_linear, "AutocastCPU")
_library.impl("linear", torch_linear, "AutocastCUDA")
_library.impl("linear", _differentiated, "Autograd")
torch.library.register_fake("moeinf::linear", _fake, lib=_library)


class Linear(torch.nn.Linear):
    """A linear layer that asks at every call which way is open to its tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        return linear(x, self.weight, self.bias)


def serve_linear(model: torch.nn.Module) -> None:
    """Makes every layer that is a `torch.nn.Linear` and no subclass of it a `Linear`.

    Parameters, hooks and names stay. A layer that is moved, cast, wrapped or tied later stays
    right, for each call looks at its tensors.
    """
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Linear
