"""torch computes a pass of a few tokens on one thread, and has its threads back afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import COMMON

import moeinf
from moeinf.integrations.transformers.passes import CACHE_NAMES
from moeinf.integrations.transformers.torch_threads import _is_small

WHOLE = 3


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(WHOLE)
    yield
    torch.set_num_threads(before)


def watched(folder: Path, **options: Any) -> tuple[Any, list[tuple[int, int]]]:
    """A served model, and (tokens, torch's threads) of each of its passes so far."""
    model = moeinf.load(folder, **options)
    seen: list[tuple[int, int]] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        tokens = args[0] if args else kwargs["input_ids"]
        seen.append((tokens.numel(), torch.get_num_threads()))

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    return model, seen


def prompt(tokens: int) -> torch.Tensor:
    return torch.randint(0, COMMON["vocab_size"], (1, tokens))


def test_a_pass_of_few_tokens_has_one_thread(qwen3_folder: Path) -> None:
    model, seen = watched(qwen3_folder)
    with torch.inference_mode():
        for tokens in (1, 16, 17, 2):
            model(prompt(tokens))
            assert torch.get_num_threads() == WHOLE
        model(input_ids=prompt(1))
    assert seen == [(1, 1), (16, 1), (17, WHOLE), (2, 1), (1, 1)]


def test_pages_of_several_texts_leave_torch_its_threads() -> None:
    pages = object()  # as continuous batching hands to the model: it has no one length
    for name in CACHE_NAMES:
        assert not _is_small((), {"input_ids": prompt(3), name: pages})
    assert _is_small((), {"input_ids": prompt(3)})


def test_a_generation_keeps_one_thread_between_its_passes(qwen3_folder: Path) -> None:
    model, seen = watched(qwen3_folder)
    between = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            between.append(torch.get_num_threads())

        def end(self) -> None:
            pass

    for tokens in (20, 3):
        model.generate(
            prompt(tokens), max_new_tokens=3, min_new_tokens=3, streamer=Streamer(), pad_token_id=0
        )
        assert torch.get_num_threads() == WHOLE
    assert seen == [(20, WHOLE), (1, 1), (1, 1), (3, 1), (1, 1), (1, 1)]
    assert between == [WHOLE, WHOLE, 1, 1, WHOLE, 1, 1, 1]  # the first is the prompt itself


def test_a_pass_that_fails_gives_the_threads_back(qwen3_folder: Path) -> None:
    model, _ = watched(qwen3_folder)
    with pytest.raises(IndexError):
        model(torch.full((1, 1), COMMON["vocab_size"]))
    assert torch.get_num_threads() == WHOLE
    with pytest.raises(IndexError):
        model.generate(torch.full((1, 2), COMMON["vocab_size"]), max_new_tokens=2, pad_token_id=0)
    assert torch.get_num_threads() == WHOLE


def test_a_long_text_keeps_the_threads(qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeinf.integrations.transformers.torch_threads.SHORT_TEXT", 18)
    model, seen = watched(qwen3_folder)
    model.generate(prompt(17), max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    assert seen == [(17, WHOLE), (1, 1), (1, 1), (1, WHOLE)]


def test_a_thread_that_begins_meanwhile_gets_its_threads_back(qwen3_folder: Path) -> None:
    """A new thread begins with the number that another one has set last."""
    model, _ = watched(qwen3_folder)
    found: list[int] = []

    def other(*_: Any) -> None:
        def run() -> None:
            second(prompt(1))
            found.append(torch.get_num_threads())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    second = moeinf.load(qwen3_folder)
    model.model.register_forward_hook(other)
    model(prompt(1))
    assert found == [WHOLE] and torch.get_num_threads() == WHOLE


def test_torch_keeps_its_threads_where_it_computes_linear_layers(qwen3_folder: Path) -> None:
    model, seen = watched(qwen3_folder, linear="torch")
    model(prompt(1))
    assert seen == [(1, WHOLE)]
