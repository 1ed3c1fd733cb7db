"""The Triton kernels and the words for what they compute, imported when first used.

The modules lie in the folder kernels/ of the repository, which the link `moeinf/kernels` points to.
That folder has no `__init__.py`: with one, it would hide Hugging Face's package `kernels` from
programs that run in the repository's root. So this file stands for the package, and says where its
modules are. Nothing is imported before a name is used, because `forms` and `gates` must work
without Triton.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeinf.kernels.experts import combine, expert_routes, fused_experts
    from moeinf.kernels.forms import ExpertForm, ExpertMatrices, Gate, Matrix

__path__ = [str(Path(__file__).with_suffix(""))]

_HOMES = {
    "ExpertForm": "forms",
    "ExpertMatrices": "forms",
    "Gate": "forms",
    "Matrix": "forms",
    "combine": "experts",
    "expert_routes": "experts",
    "fused_experts": "experts",
}

__all__ = [
    "ExpertForm",
    "ExpertMatrices",
    "Gate",
    "Matrix",
    "combine",
    "expert_routes",
    "fused_experts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moeinf.kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"moeinf.kernels.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
