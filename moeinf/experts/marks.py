"""Marks for torch's profiler, and whether it or anything else watches operators.

The core has ranges of its own for NVIDIA's profilers.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.profiler import record_function

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_HOOKS = (modules._global_forward_hooks, modules._global_forward_pre_hooks)


def is_watched() -> bool:
    """Does anything look at the operators that run: a mode, a tracer, a profiler?

    Where nothing does, operators of ours go around torch's dispatcher. After the weights of a layer
    the dispatcher is no longer in the processor's caches, and takes over 100 us.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
        or torch.autograd._profiler_enabled()
    )


def is_plain(*tensors: torch.Tensor) -> bool:
    """Are they of torch's own types, whose operators nobody overrides?"""
    return all(type(tensor) in _PLAIN for tensor in tensors)


def is_plain_call(*tensors: torch.Tensor) -> bool:
    """May an operator of ours compute these tensors at once: is neither a gradient, a transform nor
    another type wanted, and does nothing watch?"""
    if torch.compiler.is_compiling():
        return False
    return is_plain(*tensors) and not (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or is_watched()
    )


def hooks_everywhere() -> bool:
    """Are there hooks that every call of a module runs?"""
    return any(_HOOKS)


class Marks:
    """The parts of one call, one after another, as named spans in the profile.

    To ask whether a profiler runs on this thread takes well below a microsecond.
    """

    def __init__(self) -> None:
        self._wanted: bool = torch.autograd._profiler_enabled()
        self._open: record_function | None = None

    def begin(self, name: str) -> None:
        """A part begins; the part before it ends."""
        if self._wanted:
            self.end()
            self._open = record_function(name)
            self._open.__enter__()

    def end(self) -> None:
        """Harmless where nothing is open."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None
