"""The forward pass that a step belongs to, and the observers of the passes of a cache.

Information about a pass belongs to the thread that gives it. Threads that share a cache share none
of it. An integration reads it from the inputs of its model; a caller that says it itself comes
first.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Text:
    """What the tokens of a pass are. Every array has one element per token.

    sequences: the name of the sequence that the token belongs to.
    positions: its place there, or -1: no text (padding, a token that was run again). The tokens of
        a sequence from a position on are replaced when a later pass has that position again.
    prefill: it belongs to a prompt.
    """

    sequences: Array
    positions: Array
    prefill: Array

    def __getitem__(self, chosen: Array) -> Text:
        return Text(self.sequences[chosen], self.positions[chosen], self.prefill[chosen])


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """One run of a model over the tokens of one or several sequences.

    prefill: it reads prompts; else it decodes.
    new_sequence: every sequence in it begins with it.
    batch: sequences of equal length, their tokens one sequence after another; or
    sequences: the sequence of each token. Numbers of the caller's choice: the same number in a
        later pass is the same sequence, until a pass with `new_sequence`.
    positions: the place of each token in its sequence, see `Text`; without them every token is
        text, and comes after those of earlier passes.
    caller: who runs it, where one thread runs several requests in turn. Passes of one caller follow
        each other; without it the thread is the caller.
    """

    prefill: bool = False
    new_sequence: bool = False
    batch: int = 1
    sequences: Sequence[int] | None = None
    positions: Sequence[int] | None = None
    caller: int | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"ForwardPass: expected a batch of 1 or more, found {self.batch}")

    def check_tokens(self, tokens: int) -> None:
        """Raises ValueError where a pass of so many tokens cannot have these sequences."""
        for name, given in (("sequence", self.sequences), ("position", self.positions)):
            if given is not None and len(given) != tokens:
                raise ValueError(
                    f"ForwardPass: expected the {name} of each of {tokens} tokens, found "
                    f"{len(given)}"
                )
        if self.sequences is None and tokens % self.batch:
            raise ValueError(
                f"ForwardPass: expected {self.batch} sequences of equal length, found {tokens} "
                "tokens"
            )

    def text(self, tokens: int, earlier: int) -> Text:
        """What its tokens are; asked once the pass is over. `earlier` tokens came before them."""
        if self.sequences is None:
            sequences = np.repeat(np.arange(self.batch), tokens // self.batch)
        else:
            sequences = np.array(self.sequences)
        positions = earlier + np.arange(tokens)
        if self.positions is not None:
            positions = np.array(self.positions)
        return Text(sequences, positions, np.full(tokens, self.prefill))


UNANNOUNCED = ForwardPass()
MOST_CALLERS = 64  # whose passes one thread can run in turn


class Observer(Protocol):
    """Sees the passes of a cache."""

    def begin_pass(self, one: ForwardPass, caller: int) -> None:
        """The caller begins a pass."""

    def add(
        self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor, caller: int
    ) -> None:
        """The routing of one MoE layer, both [T, k]; the ids on the host."""


class Passes(threading.local):
    """The pass that the calling thread is in; `observers` are the same for all threads.

    The base class calls `__init__` once in each thread that uses the object.
    """

    def __init__(self, observers: list[Observer]):
        self.observers = observers
        self.caller = threading.get_ident()
        self.current = UNANNOUNCED
        self._said = False  # by the caller itself, and no step has used it yet
        self._in_progress: dict[int, ForwardPass] = {}  # by caller, the latest last
        self._to_begin: set[int] = set()  # callers whose next step opens a new sequence

    def begin(self, one: ForwardPass, *, said: bool) -> None:
        """The thread's next steps belong to `one`. It begins once, also where the passes of
        several callers take turns.

        A pass that the caller has `said` and that no step has used is not replaced by one that an
        integration has read from the inputs of a model.
        """
        if one is self.current or (self._said and not said):
            return
        self._said = said
        self.current = one
        self.caller = threading.get_ident() if one.caller is None else one.caller
        before = self._in_progress.pop(self.caller, None)
        self._in_progress[self.caller] = one
        if before is one:
            return
        if len(self._in_progress) > MOST_CALLERS:
            del self._in_progress[next(iter(self._in_progress))]
        (self._to_begin.add if one.new_sequence else self._to_begin.discard)(self.caller)
        for observer in tuple(self.observers):
            observer.begin_pass(one, self.caller)

    def of_step(self) -> tuple[bool, bool, int, int]:
        """Of the step about to begin: prefill, whether it opens a new sequence, its caller, and the
        number of its sequences. Where it opens one, `takes_first_step` is to be called too."""
        self._said = False
        current, caller = self.current, self.caller
        return current.prefill, caller in self._to_begin, caller, current.batch

    def takes_first_step(self) -> bool:
        """Does the step about to begin open a new sequence? True once for each."""
        self._said = False
        if self.caller not in self._to_begin:
            return False
        self._to_begin.discard(self.caller)
        return True

    def observe(self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """Shows the observers the routing of one layer; the ids on the host."""
        if torch._C._current_graph_task_id() >= 0:  # gradient checkpointing computes it again
            return
        for observer in tuple(self.observers):
            observer.add(layer, topk_ids, topk_weights, self.caller)
