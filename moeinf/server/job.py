"""One request while it is being answered: what is asked, and what its client is told.

waiting --a thread is free--> running --its end--> Ended
   |                             |---an error----> Failed
   `---refused while draining----'
Either may be cancelled, by its client or at the end of the server: then nobody is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moeinf.server.errors import Refused


@dataclass(frozen=True)
class Chance:
    """A token, its log-probability, and those of the likeliest tokens in its place.

    `offset` is the length of the text before it.
    """

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]
    offset: int


@dataclass(frozen=True)
class Started:
    """A thread has taken the job."""


@dataclass(frozen=True)
class Piece:
    """Text that is certain, and the chances of its tokens where they were asked for."""

    text: str
    chances: list[Chance]


@dataclass(frozen=True)
class Ended:
    """`reason` is OpenAI's finish_reason: "stop" or "length"."""

    reason: str
    new_tokens: int


@dataclass(frozen=True)
class Failed:
    """Nothing more comes."""

    error: Refused


Event = Started | Piece | Ended | Failed


@dataclass(eq=False)
class Job:
    """What to write; `send` may be called from any thread."""

    prompt: list[int]
    max_new_tokens: int
    seed: int
    send: Callable[[Event], None]
    sampling: dict[str, Any] = field(default_factory=dict)  # for generate; empty: the checkpoint's
    stops: list[str] = field(default_factory=list)
    top_logprobs: int | None = None
    cancelled: bool = False
    asked: float = field(default_factory=time.perf_counter)
