"""Connects a priors hook to a live cache."""

from __future__ import annotations

from moeinf import _core
from moeinf.cache.observers import PassObserver, RoutedPass
from moeinf.traces.priors import GuardedHook, PriorsHook


class LivePriors(PassObserver):
    """Shows a hook every forward pass of a live cache, and gives its priors to the policy.

    One pass at a time. If several threads generate, their passes come in any order.
    """

    def __init__(self, hook: PriorsHook, core: _core.ExpertCache, shape: tuple[int, int]) -> None:
        super().__init__(*shape)
        self._hook = GuardedHook(hook, num_layers=shape[0], num_experts=shape[1])
        self._core = core

    def on_pass(self, one: RoutedPass) -> None:
        if len(one.experts) == 0:
            return
        priors = self._hook(one.experts, one.info.new_sequence)
        if priors is not None:
            self._core.set_priors(priors)
