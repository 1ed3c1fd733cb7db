"""Finds settings that make a checkpoint faster here, by runs of the real model in pairs.

    settings now --+
                   +-- pairs of runs --> better by more than the noise? --yes--> settings now
    candidate -----+                                                     \\--no--> dropped

Each run loads the model anew and writes the same text. A candidate is kept if it wins at least
PAIRS - LOSSES of PAIRS pairs, and GAIN at the median: of two equal settings one in 28 wins so
often. It is dropped as soon as it has lost more. No setting may change a token.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from moeinf.checkpoint.folder import Checkpoint
from moeinf.experts.cpu import default_engine
from moeinf.integrations.transformers.generation import Request, Result, generate
from moeinf.integrations.transformers.load import load

PAIRS = 8
LOSSES = 1
GAIN = 0.02
Settings = dict[str, Any]
LOOKUP = 3  # tokens of a guess


@dataclass(frozen=True)
class Trial:
    """A candidate: the seconds of its runs over those without it, pair by pair."""

    setting: str
    value: Any
    ratios: list[float]
    kept: bool


@dataclass(frozen=True)
class Start:
    """What is there before any trial."""

    settings: Settings
    fingerprint: str  # of the experts
    device: str  # its kind
    resident: bool  # every expert has a slot


class Runs:
    """Runs of one model. Called with settings, it gives the seconds of a token."""

    def __init__(self, request: Request, memory: str):
        self.request = request
        self.memory = memory
        self.first: Result | None = None

    def __call__(self, settings: Settings) -> float:
        """Raises RuntimeError where a setting changes a token."""
        options = {**settings, "tuned": False}
        lookup = {"prompt_lookup_num_tokens": LOOKUP} if options.pop("speculation", False) else {}
        request = replace(self.request, options=options, generation=lookup)
        result = generate(request, memory=self.memory, stream=None)
        if self.first is None:
            self.first = result
        elif not lookup and result.tokens != self.first.tokens:
            raise RuntimeError(f"{settings}: expected the tokens of the first run, found others")
        if not result.metrics.tokens_per_second:
            raise ValueError("the text ended at its first token: nothing was measured")
        return 1 / result.metrics.tokens_per_second


def candidates(start: Start) -> Iterator[tuple[str, Any]]:
    """What is tried, in this order. Where every expert has a slot, nothing is read for long."""
    threads = start.settings.get("threads", 1)
    yield from (("threads", fewer) for fewer in {threads - 1, threads // 2} if fewer > 0)
    if not start.resident:
        yield from (("reader_threads", number) for number in (4, 24))
        yield from (("chunk_bytes", number << 10) for number in (256, 4096))
        yield from (("prefetch", name) for name in ("gate", "transition"))
        yield from (("policy", name) for name in ("decayed_lfu", "lru"))


def compare(run: Callable[[Settings], float], now: Settings, other: Settings) -> list[float]:
    """The seconds of `other` over those of `now`, until `other` cannot be kept any more."""
    ratios: list[float] = []
    while len(ratios) < PAIRS and sum(one >= 1 for one in ratios) <= LOSSES:
        if len(ratios) % 2:
            after, before = run(other), run(now)
        else:
            before, after = run(now), run(other)
        ratios.append(after / before)
    return ratios


def is_better(ratios: list[float]) -> bool:
    """By more than the noise."""
    return (
        len(ratios) == PAIRS
        and sum(one >= 1 for one in ratios) <= LOSSES
        and statistics.median(ratios) < 1 - GAIN
    )


def tune(
    run: Callable[[Settings], float],
    start: Settings,
    tried: Iterator[tuple[str, Any]],
    told: Callable[[Trial], None],
) -> Settings:
    """The settings that were kept, without those of `start`; each trial is told when it ends."""
    run(start)  # files, libraries and kernels are there from now on
    now: Settings = dict(start)
    for name, value in tried:
        if value == now.get(name):
            continue
        ratios = compare(run, now, {**now, name: value})
        kept = is_better(ratios)
        told(Trial(name, value, ratios, kept))
        if kept:
            now[name] = value
    ratios = compare(run, {**now, "speculation": True}, now)
    kept = is_better(ratios)
    told(Trial("speculation", False, ratios, kept))
    if kept:
        now["speculation"] = False
    return {name: value for name, value in now.items() if value != start.get(name)}


def survey(checkpoint: Checkpoint, device: str, memory: str) -> Start:
    """Loads the model once, with the usual settings."""
    settings: Settings = {
        "reader_threads": 0,
        "chunk_bytes": 0,
        "policy": "learned",
        "prefetch": "off",
    }
    model: Any = load(checkpoint, device=device, memory=memory, tuned=False, **settings)
    cache = model.moeinf.cache
    if cache.device.type == "cpu":
        settings["threads"] = default_engine().threads
    total = cache.store.num_layers * cache.store.num_experts
    return Start(settings, cache.store.fingerprint, cache.device.type, cache.slots >= total)
