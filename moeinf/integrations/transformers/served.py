"""The experts modules of a served model, and the implementation "moeinf" that they are served by.

The weights of such a module are not in it, so no other implementation can compute it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeinf.cache.cache import ExpertCache
from moeinf.errors import UnsupportedError
from moeinf.experts.op import fused_experts
from moeinf.integrations.transformers.whole import class_of

IMPLEMENTATION = "moeinf"


def serve(module: Any, cache: ExpertCache, layer: int) -> None:
    """From now on the module computes out of the cache, as MoE layer `layer`."""
    module.moeinf_cache = cache
    module.moeinf_layer = layer
    module.__class__ = class_of(_Served, type(module))


class _Served:
    """A base of the classes of served modules."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k] -> [T, H]."""
        asked = self.config._experts_implementation
        if asked != IMPLEMENTATION:
            raise UnsupportedError(
                f"{type(self).__name__}: the experts of this model are served by moeinf and not in "
                f"memory: expected experts_implementation={IMPLEMENTATION!r}, found {asked!r}"
            )
        return fused_experts(
            hidden_states, top_k_index, top_k_weights, self.moeinf_cache, self.moeinf_layer
        )


def _refuse(self: Any, *_: Any, **__: Any) -> torch.Tensor:
    """What transformers runs for a model that was told so by its configuration alone."""
    raise UnsupportedError(
        f"{type(self).__name__}: experts_implementation={IMPLEMENTATION!r} serves models that "
        "moeinf.load loaded"
    )


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _refuse)
