"""Hooks: a user's object that sees the routing once per token and returns priors for experts.

Neither the live cache nor the simulator calls a hook while it decides. A hook that fails causes one
warning, and the last valid priors stay in use.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class PriorsHook(Protocol):
    """What a hook looks like."""

    def observe(self, experts: Array, new_sequence: bool) -> Array | None:
        """Sees one forward pass and may answer with priors.

        experts       int16 [tokens, layers, k], routed ids in routing order, -1: none
        new_sequence  the pass is the first of a request
        returns       [layers, num_experts] in [0, 1], how likely each expert is to be used soon,
                      or None to leave the priors as they are
        """


class GuardedHook:
    """Calls a hook and returns only valid priors: float32 [layers * num_experts], or None."""

    def __init__(self, hook: PriorsHook, *, num_layers: int, num_experts: int) -> None:
        self.hook = hook
        self.shape = (num_layers, num_experts)
        self.warned = False

    def __call__(self, experts: Array, new_sequence: bool) -> Array | None:
        try:
            answer = self.hook.observe(experts, new_sequence)
            if answer is None:
                return None
            priors = np.asarray(answer, dtype=np.float32)
            if priors.shape != self.shape:
                raise ValueError(f"expected priors of shape {self.shape}, found {priors.shape}")
            if not np.isfinite(priors).all():
                raise ValueError("expected finite priors, found NaN or infinity")
        except Exception as error:
            if not self.warned:
                self.warned = True
                warnings.warn(
                    f"priors hook {type(self.hook).__name__} failed, the last good priors stay: "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return None
        return np.ascontiguousarray(np.clip(priors, 0.0, 1.0)).ravel()
