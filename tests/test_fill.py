"""`fill`: a budget that holds every expert reads them all in the background, layer by layer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import COMMON

import moeinf

DEADLINE = 60.0  # seconds


@pytest.fixture
def store(qwen3_folder: Path) -> moeinf.ExpertStore:
    return moeinf.ExpertStore.open(qwen3_folder)


def every_expert_is_resident(cache: Any) -> bool:
    experts = cache.store.num_experts
    return all(len(cache.resident(layer)) == experts for layer in range(cache.store.num_layers))


def wait_until_full(cache: Any) -> None:
    end = time.monotonic() + DEADLINE
    while not every_expert_is_resident(cache):
        assert time.monotonic() < end, "the slots were not filled"
        time.sleep(0.005)


def test_every_expert_is_read_once(store: moeinf.ExpertStore) -> None:
    total = store.num_layers * store.num_experts
    cache = moeinf.ExpertCache(store, slots=total)
    cache.acquire(1, [2]).release()
    assert cache.fill() == total - 1
    wait_until_full(cache)
    assert cache.fill() == 0
    stats = cache.stats()
    assert stats["demand_bytes"] + stats["prefetch_bytes"] == total * store.layout.nbytes
    assert stats["evictions"] == 0
    for layer in range(store.num_layers):
        with cache.acquire(layer, range(store.num_experts)) as lease:
            for expert, slot in zip(lease.experts, lease.slots, strict=True):
                for name, tensor in store.read(layer, expert).items():
                    assert torch.equal(cache.views()[name][slot], tensor)
    assert cache.stats()["misses"] == 1


def test_a_smaller_budget_is_not_filled(store: moeinf.ExpertStore) -> None:
    cache = moeinf.ExpertCache(store, slots=store.num_layers * store.num_experts - 1)
    assert cache.fill() == 0
    assert not any(cache.resident(layer) for layer in range(store.num_layers))


def test_a_model_gives_the_same_while_it_is_filled(qwen3_folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, COMMON["vocab_size"], (1, 7), generator=generator)
    with torch.inference_mode():
        expected = moeinf.load(qwen3_folder, slots=2, fill=True)(prompt).logits
        for _ in range(5):
            model = moeinf.load(qwen3_folder, fill=True)
            assert torch.equal(model(prompt).logits, expected)
    wait_until_full(model.moeinf.cache)
    with torch.inference_mode():
        assert torch.equal(model(prompt).logits, expected)


def test_a_cache_may_end_while_it_is_filled(store: moeinf.ExpertStore) -> None:
    for _ in range(10):
        cache = moeinf.ExpertCache(store, slots=store.num_layers * store.num_experts)
        cache.fill()
        del cache
