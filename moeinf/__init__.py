"""Runs Mixture-of-Experts models larger than fast memory: experts cached in slots.

model = moeinf.load("path/to/checkpoint", memory="25%")      # an ordinary transformers model
cache = moeinf.ExpertCache(moeinf.ExpertStore.open(path), memory="2GiB")
y = moeinf.fused_experts(hidden, topk_ids, topk_weights, cache, layer=0)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

try:
    from moeinf import _core
except ImportError as error:
    raise ImportError(
        "moeinf's compiled core is missing here. In a source checkout install the package first: "
        "`pip install -e .` (or `python setup.py build_ext --inplace`)."
    ) from error

if TYPE_CHECKING:
    from moeinf.cache.cache import ExpertCache
    from moeinf.cache.group import CacheGroup
    from moeinf.cache.host_tier import HostTier
    from moeinf.cache.lease import Lease
    from moeinf.cache.passes import ForwardPass
    from moeinf.checkpoint.store import ExpertStore
    from moeinf.errors import (
        CapacityError,
        CheckpointError,
        ReadError,
        TraceError,
        UnsupportedError,
    )
    from moeinf.experts.linear import linear
    from moeinf.experts.op import fused_experts
    from moeinf.integrations.transformers.load import load
    from moeinf.traces.eam import EAMC
    from moeinf.traces.simulator import simulate
    from moeinf.traces.trace import Trace

# Imported when first used: torch and transformers take seconds, and `moeinf --help` needs neither.
_HOMES = {
    "EAMC": "moeinf.traces.eam",
    "CacheGroup": "moeinf.cache.group",
    "CapacityError": "moeinf.errors",
    "CheckpointError": "moeinf.errors",
    "ExpertCache": "moeinf.cache.cache",
    "ExpertStore": "moeinf.checkpoint.store",
    "ForwardPass": "moeinf.cache.passes",
    "HostTier": "moeinf.cache.host_tier",
    "Lease": "moeinf.cache.lease",
    "ReadError": "moeinf.errors",
    "Trace": "moeinf.traces.trace",
    "TraceError": "moeinf.errors",
    "UnsupportedError": "moeinf.errors",
    "fused_experts": "moeinf.experts.op",
    "linear": "moeinf.experts.linear",
    "load": "moeinf.integrations.transformers",
    "simulate": "moeinf.traces.simulator",
}

__all__ = [
    "EAMC",
    "CacheGroup",
    "CapacityError",
    "CheckpointError",
    "ExpertCache",
    "ExpertStore",
    "ForwardPass",
    "HostTier",
    "Lease",
    "ReadError",
    "Trace",
    "TraceError",
    "UnsupportedError",
    "fused_experts",
    "linear",
    "load",
    "policies",
    "simulate",
]


def policies() -> list[str]:
    """The names that `policy=` accepts."""
    return list(_core.policy_names())


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return importlib.import_module("moeinf.kernels")
    if name not in _HOMES:
        raise AttributeError(f"module 'moeinf' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
