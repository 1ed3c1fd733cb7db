"""One thread for torch in passes of a few tokens on the CPU.

torch's OpenMP threads spin for milliseconds after each parallel operator. In a decode step they
would spin on the cores that the threads of the experts need. The products run on those threads, and
what is left for torch is too small to be shared out, as long as the texts are short.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moeinf.integrations.transformers.passes import CACHE_NAMES

FEW_TOKENS = 16
# Attention reads all earlier tokens: where they are many, two threads are faster than one.
SHORT_TEXT = 2048


_elsewhere: list[int] = []  # torch's threads outside the small passes that are in progress


class _OfThread(threading.local):
    before: int | None = None  # torch's threads outside the pass or the generation in progress
    generations = 0

    def enter(self) -> None:
        if self.before is None:
            self.before = torch.get_num_threads()
            if self.before == 1 and _elsewhere:  # a new thread begins with what another one has set
                self.before = _elsewhere[-1]
            _elsewhere.append(self.before)
        torch.set_num_threads(1)

    def leave(self) -> None:
        if self.before is not None:
            _elsewhere.remove(self.before)
            torch.set_num_threads(self.before)
            self.before = None


class TorchThreads:
    """Sets the number of torch's threads around the passes of a model, from hooks on it.

    A generation keeps the number between its passes, for the choice of a token is as small.

        outside --a pass of few tokens--> one thread --the pass ends--> outside
        generation: one thread from its first pass of few tokens to its end, but for passes of many
    """

    def __init__(self, model: torch.nn.Module):
        self._mine = _OfThread()
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, always_call=True)

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Around `generate`."""
        mine = self._mine
        mine.generations += 1
        try:
            yield
        finally:
            mine.generations -= 1
            self._leave()

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        mine = self._mine
        if _is_small(args, kwargs):
            mine.enter()
        elif mine.before is not None:
            torch.set_num_threads(mine.before)

    def _after(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._leave()

    def _leave(self) -> None:
        if not self._mine.generations:
            self._mine.leave()


def _is_small(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    tokens = kwargs.get("decoder_input_ids")
    if tokens is None:
        tokens = args[0] if args else kwargs.get("input_ids")
    if not isinstance(tokens, torch.Tensor) or not 0 < tokens.numel() <= FEW_TOKENS:
        return False
    past = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    if past is None:
        return True
    length = getattr(past, "get_seq_length", None)  # pages of several texts have no one length
    return length is not None and int(length()) <= SHORT_TEXT
