"""Guesses that one pass verifies: they change no token, and are decoding for all that look on.

A verify pass has several tokens, so that its float32 sums may round another way than those of one
token. Texts may part where two tokens are that near to each other, and nowhere else. Between
budgets no bit may differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import COMMON, write_checkpoint

import moeinf
from moeinf.traces.trace import DECODE, PREFILL

NEW = 20
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW}
NEAR = 1e-4  # of logits whose size is about 1
WAYS = ["prompt lookup", "assistant", "itself"]


def load(folder: Path, **options: Any) -> Any:
    model = moeinf.load(folder, device="cpu", **options)
    model.generation_config.eos_token_id = COMMON["vocab_size"]  # no text ends by chance
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("speculation"))


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Another model, whose guesses are mostly wrong."""
    return load(write_checkpoint(tmp_path_factory.mktemp("drafts"), seed=3), slots=4)


@pytest.fixture
def prompt(seed: int) -> torch.Tensor:
    """It repeats itself, so that guesses come; not all of them are right."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.randint(1, COMMON["vocab_size"], (1, 4), generator=generator)
    return part.repeat(1, 4)


def guessing(way: str, model: Any, drafts: Any) -> dict[str, Any]:
    if way == "prompt lookup":
        return {"prompt_lookup_num_tokens": 3}
    return {"assistant_model": drafts if way == "assistant" else model}


class Passes:
    """The passes of a cache: is it a prompt, its tokens."""

    def __init__(self, cache: Any):
        self.seen: list[tuple[bool, bool, int]] = []
        self._now: Any = None
        cache.observers.append(self)

    def begin_pass(self, one: Any, caller: int) -> None:
        self._now = one

    def add(self, layer: int, topk_ids: torch.Tensor, _: torch.Tensor, caller: int) -> None:
        if layer == 0:
            self.seen.append((self._now.prefill, self._now.new_sequence, len(topk_ids)))


def expect_same_text(found: torch.Tensor, plain: Any, start: int) -> None:
    """The same tokens, up to the first place where greedy decoding had two that were near."""
    differ = (found != plain.sequences).nonzero()
    if len(differ) == 0:
        return
    place = int(differ[0, 1])
    logits = plain.logits[place - start][0]
    gap = logits[plain.sequences[0, place]] - logits[found[0, place]]
    assert gap <= NEAR * logits.abs().max(), f"token {place} is another one"


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_plain_decoding_at_every_budget(
    way: str, folder: Path, drafts: Any, prompt: torch.Tensor
) -> None:
    start = prompt.shape[1]
    texts = []
    for options in (
        {},
        {"slots": 1},
        {"slots": 5, "policy": "lru"},
        {"slots": 7, "prefetch": "transition"},
        {"slots": 7, "prefetch": "gate"},
    ):
        model = load(folder, **options)
        if not texts:
            plain = model.generate(
                prompt, output_logits=True, return_dict_in_generate=True, **GREEDY
            )
        texts.append(model.generate(prompt, **guessing(way, model, drafts), **GREEDY))
    assert texts[0].shape == (1, start + NEW)
    assert all(torch.equal(texts[0], one) for one in texts[1:])
    expect_same_text(texts[0], plain, start)


@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_verify_passes_decode(way: str, folder: Path, drafts: Any, prompt: torch.Tensor) -> None:
    """For policies and predictors, which take it from the pass; a prompt comes once."""
    model = load(folder, slots=7, prefetch="transition")
    passes = Passes(model.moeinf.cache)
    model.generate(prompt, **guessing(way, model, drafts), **GREEDY)
    first, *others = passes.seen
    assert first == (True, True, first[2]) and first[2] >= prompt.shape[1]
    assert others and not any(prefill or new for prefill, new, _ in others)
    assert max(tokens for *_, tokens in others) > 1, "no pass verified a guess"
    assert model.moeinf.stats()["prefetch"]["predicted"] > 0


@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_wrong_guesses_are_no_text(
    way: str, folder: Path, drafts: Any, prompt: torch.Tensor
) -> None:
    """In a trace, and for a hook that gives priors: what it sees is each token of the text once."""

    class Hook:
        def __init__(self) -> None:
            self.tokens = 0

        def observe(self, experts: Any, new_sequence: bool) -> None:
            self.tokens += len(experts)

    hook = Hook()
    model = load(folder, slots=7, priors=hook)
    cache = model.moeinf.cache
    passes = Passes(cache)
    with cache.record() as recorder:
        text = model.generate(prompt, **guessing(way, model, drafts), **GREEDY)
    ran = sum(tokens for *_, tokens in passes.seen)
    trace = recorder.trace()
    assert trace.num_tokens == text.shape[1] - 1, "the last token that was chosen is not run"
    assert (trace.phase[: prompt.shape[1]] == PREFILL).all()
    assert (trace.phase[prompt.shape[1] :] == DECODE).all()
    assert len(np.unique(trace.sequence)) == 1
    assert ran > trace.num_tokens, "no guess was wrong"
    for one in cache.observers:
        getattr(one, "finish_passes", lambda: None)()
    assert hook.tokens == trace.num_tokens
