"""The right to read some slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager


class Lease(AbstractContextManager["Lease"]):
    """The right to read some slots until released: they are neither evicted nor overwritten.

    A context manager. `slots[i]` is where `experts[i]` lies.
    """

    def __init__(self, experts: Sequence[int], slots: Sequence[int], release: Callable[[], None]):
        self.experts = list(experts)
        self.slots = list(slots)
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Gives the slots back. Harmless when called twice."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __exit__(self, *error: object) -> None:
        self.release()
