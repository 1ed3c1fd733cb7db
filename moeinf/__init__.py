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
    from moeinf.checkpoint.formats import FORMATS, WeightFormat
    from moeinf.checkpoint.store import ExpertStore
    from moeinf.errors import (
        CapacityError,
        CheckpointError,
        ReadError,
        TraceError,
        UnsupportedError,
    )
    from moeinf.experts.linear import linear
    from moeinf.experts.op import fused_experts, fused_experts_out
    from moeinf.integrations.transformers.load import load
    from moeinf.kernels.forms import ExpertForm, Gate
    from moeinf.native import get_include, get_library
    from moeinf.packing.pack import pack
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
    "ExpertForm": "moeinf.kernels.forms",
    "ExpertStore": "moeinf.checkpoint.store",
    "FORMATS": "moeinf.checkpoint.formats",
    "ForwardPass": "moeinf.cache.passes",
    "Gate": "moeinf.kernels.forms",
    "HostTier": "moeinf.cache.host_tier",
    "Lease": "moeinf.cache.lease",
    "ReadError": "moeinf.errors",
    "Trace": "moeinf.traces.trace",
    "TraceError": "moeinf.errors",
    "UnsupportedError": "moeinf.errors",
    "WeightFormat": "moeinf.checkpoint.formats",
    "fused_experts": "moeinf.experts.op",
    "fused_experts_out": "moeinf.experts.op",
    "get_include": "moeinf.native",
    "get_library": "moeinf.native",
    "linear": "moeinf.experts.linear",
    "load": "moeinf.integrations.transformers",
    "pack": "moeinf.packing.pack",
    "simulate": "moeinf.traces.simulator",
}

__all__ = [
    "EAMC",
    "FORMATS",
    "CacheGroup",
    "CapacityError",
    "CheckpointError",
    "ExpertCache",
    "ExpertForm",
    "ExpertStore",
    "ForwardPass",
    "Gate",
    "HostTier",
    "Lease",
    "ReadError",
    "Trace",
    "TraceError",
    "UnsupportedError",
    "WeightFormat",
    "fused_experts",
    "fused_experts_out",
    "get_include",
    "get_library",
    "linear",
    "load",
    "pack",
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
    if name == "ExpertCache":  # torch.ops.moeinf take its name: whoever has one has them
        importlib.import_module("moeinf.experts.op")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
