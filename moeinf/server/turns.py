"""Threads that run one model take turns: one runs, the others wait in the order of coming.

The forward passes of two requests on the same cores or the same GPU would only slow each other
down. In turns, every request has its next token after one pass of each other one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Turns:
    """A lock that is handed over in order, and torch's random numbers with it.

    waiting --its turn comes--> running --hand_over()--> waiting, behind all others
                                   `----the end--------> gone
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    @contextmanager
    def turn(self, seed: int) -> Iterator[None]:
        """Waits for the first turn, and gives the last one away at the end.

        Within it torch's random numbers are those of `seed`, as if no other thread drew any.
        """
        self._take()
        try:
            torch.manual_seed(seed)
            yield
        finally:
            self._give()

    def hand_over(self) -> None:
        """Lets all others have a turn, if any waits."""
        if not self._waiting:
            return
        state = self._random_state()
        self._give()
        self._take()
        torch.set_rng_state(state[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self._device)

    def _random_state(self) -> list[torch.Tensor]:
        state = [torch.get_rng_state()]
        if self._device.type == "cuda":
            state.append(torch.cuda.get_rng_state(self._device))
        return state

    def _take(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()

    def _give(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
