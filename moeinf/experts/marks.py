"""Marks for torch's profiler. The core has ranges of its own for NVIDIA's profilers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

_NOTHING: AbstractContextManager[Any] = nullcontext()


def mark(name: str) -> AbstractContextManager[Any]:
    """A named span in the profile; nothing, at no cost, where no profiler runs."""
    return record_function(name) if torch.autograd._profiler_enabled() else _NOTHING
