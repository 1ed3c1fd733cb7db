"""A long prompt reads each expert once, and leaves in the slots what decoding begins with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import COMMON, write_checkpoint

import moeinf

LAYERS, EXPERTS, TOP_K = 5, 32, 4
DEADLINE = 60.0  # seconds
TOKENS = 300


def checkpoint(folder: Path, **options: Any) -> Path:
    return write_checkpoint(
        folder,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        **options,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("long"))


@pytest.fixture
def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompt(random: torch.Generator, tokens: int) -> torch.Tensor:
    return torch.randint(0, COMMON["vocab_size"], (1, tokens), generator=random)


def bytes_read(cache: Any) -> int:
    stats = cache.stats()
    return stats["demand_bytes"] + stats["prefetch_bytes"]


@pytest.mark.parametrize("slots", [1, 7, LAYERS * EXPERTS // 4])
@pytest.mark.parametrize("policy", ["learned", "lru"])
def test_each_expert_is_read_at_most_once(
    folder: Path, policy: str, slots: int, random: torch.Generator
) -> None:
    model = moeinf.load(folder, slots=slots, policy=policy)
    cache = model.moeinf.cache
    all_experts = LAYERS * EXPERTS * cache.store.layout.nbytes
    for _ in range(3):  # the second text finds the slots as the first one has left them
        model.moeinf.reset_stats()
        with torch.no_grad():
            model(prompt(random, TOKENS))
            settle(cache)
            assert bytes_read(cache) <= 1.05 * all_experts
            model.generate(prompt(random, 3), max_new_tokens=4, do_sample=False)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_and_budgets_give_the_same_bits(
    tmp_path: Path, dtype: torch.dtype, random: torch.Generator
) -> None:
    """bf16 runs on a matrix unit where there is one, in other kernels than a call of few tokens."""
    folder = checkpoint(tmp_path, dtype=dtype)
    text = prompt(random, TOKENS)
    whole = moeinf.load(folder, slots=LAYERS * EXPERTS)
    expected = whole(text).logits
    config = whole.config
    row = 4 * TOP_K * (config.hidden_size + config.moe_intermediate_size)
    reads = []
    for slots, scratch in ((3, None), (20, None), (20, 100 * row), (20, 7 * row), (1, "1B")):
        model = moeinf.load(folder, slots=slots, scratch=scratch)
        assert torch.equal(model(text).logits, expected), (slots, scratch)
        reads.append(bytes_read(model.moeinf.cache))
        assert torch.equal(model(text[:, :70]).logits, whole(text[:, :70]).logits)
    assert reads[1] < reads[2] < reads[3]  # each part reads experts again


@pytest.mark.parametrize("scratch", ["0", -5, "much"])
def test_scratch_that_is_no_size_is_refused(folder: Path, scratch: Any) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        moeinf.load(folder, scratch=scratch)


class Runner:
    """Runs steps with routing of the caller's choice."""

    def __init__(self, folder: Path, **options: Any):
        self.cache = moeinf.ExpertCache(moeinf.ExpertStore.open(folder), **options)
        self.random = torch.Generator().manual_seed(0)

    def layer(self, layer: int, ids: torch.Tensor) -> None:
        """ids: [T, k]"""
        hidden = torch.randn(len(ids), COMMON["hidden_size"], generator=self.random)
        moeinf.fused_experts(hidden, ids, torch.ones(ids.shape), self.cache, layer)

    def forward(self, ids: Sequence[torch.Tensor], *, prefill: bool) -> None:
        self.cache.begin_pass(moeinf.ForwardPass(prefill=prefill, new_sequence=prefill))
        for layer, of_layer in enumerate(ids):
            self.layer(layer, of_layer)


def settle(cache: Any) -> None:
    """Waits for reads in flight."""
    before, end = -1, time.monotonic() + DEADLINE
    while (now := bytes_read(cache)) != before and time.monotonic() < end:
        before = now
        time.sleep(0.05)


def routed(tokens: int, among: range, random: torch.Generator) -> list[torch.Tensor]:
    """Of each layer: [tokens, k], distinct experts per token."""
    scores = torch.rand(LAYERS, tokens, len(among), generator=random)
    return list(scores.topk(TOP_K).indices + among.start)


@pytest.mark.parametrize("policy", ["learned", "lru", "lfu"])
def test_decoding_finds_what_the_latest_tokens_used(
    folder: Path, policy: str, random: torch.Generator
) -> None:
    """The text turns to other experts near its end, and goes on with these."""
    slots = LAYERS * EXPERTS // 4  # a share of 7 experts in each layer
    early, late = range(8, EXPERTS), range(6)
    rates = {}
    ending = routed(64, late, random)
    for name, beginning in (("short", 0), ("long", TOKENS)):
        runner = Runner(folder, slots=slots, policy=policy)
        # Of an earlier text: every slot is taken.
        runner.forward(routed(TOKENS, range(EXPERTS), random), prefill=True)
        start = routed(beginning, early, random)
        prompt = [torch.cat(parts) for parts in zip(start, ending, strict=True)]
        runner.forward(prompt, prefill=True)
        settle(runner.cache)
        runner.cache.reset_stats()
        for _ in range(10):
            runner.forward(routed(1, late, random), prefill=False)
        rates[name] = runner.cache.stats()["hit_rate"]
    assert rates["long"] >= rates["short"]
    assert rates["long"] == 1


def test_the_next_layer_is_read_while_this_one_computes(
    folder: Path, random: torch.Generator
) -> None:
    runner = Runner(folder, slots=48)
    cache = runner.cache
    ids = routed(TOKENS, range(EXPERTS), random)
    cache.begin_pass(moeinf.ForwardPass(prefill=True, new_sequence=True))
    for layer, of_layer in enumerate(ids):
        ahead = len(cache.resident(layer))
        assert (ahead > 0) == (layer > 0)
        runner.layer(layer, of_layer)
        settle(cache)
    assert cache.stats()["prefetch_wasted_bytes"] == 0
    assert bytes_read(cache) == LAYERS * EXPERTS * cache.store.layout.nbytes


def test_with_room_for_all_nothing_leaves(folder: Path, random: torch.Generator) -> None:
    runner = Runner(folder, slots=LAYERS * EXPERTS)
    cache = runner.cache
    for _ in range(2):
        runner.forward(routed(TOKENS, range(EXPERTS), random), prefill=True)
        settle(cache)
        assert cache.stats()["evictions"] == 0
        assert all(len(cache.resident(layer)) == EXPERTS for layer in range(LAYERS))
    assert bytes_read(cache) == LAYERS * EXPERTS * cache.store.layout.nbytes


def test_a_short_prompt_reads_nothing_ahead(folder: Path, random: torch.Generator) -> None:
    runner = Runner(folder, slots=48)
    runner.forward(routed(2 * EXPERTS - 1, range(EXPERTS), random), prefill=True)
    settle(runner.cache)
    assert runner.cache.stats()["prefetch_bytes"] == 0
