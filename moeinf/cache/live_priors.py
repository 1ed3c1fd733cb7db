"""Connects a priors hook to a live cache."""

from __future__ import annotations

from moeinf import _core
from moeinf.cache.observers import Pass, PassObserver
from moeinf.traces.priors import GuardedHook, PriorsHook


class LivePriors(PassObserver):
    """Shows a hook every forward pass of a live cache, and gives its priors to the policy."""

    def __init__(self, hook: PriorsHook, core: _core.ExpertCache, shape: tuple[int, int]) -> None:
        super().__init__(shape[0])
        self._hook = GuardedHook(hook, num_layers=shape[0], num_experts=shape[1])
        self._core = core

    def on_pass(self, one: Pass) -> None:
        priors = self._hook(one.experts, one.new_sequence)
        if priors is not None:
            self._core.set_priors(priors)
