"""Views of a pool stay readable whatever becomes of its slots."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from fake_cuda_library import fake_cuda_library

import moeinf

TOTAL = 18
WAIT = 20  # seconds


@pytest.fixture(autouse=True, scope="module")
def driver() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("MOEINF_CUDA_DRIVER", str(fake_cuda_library()))
    yield
    patch.undo()


def fill(cache: moeinf.ExpertCache) -> None:
    for layer in range(3):
        cache.acquire(layer, range(6)).release()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_view_keeps_the_bytes_of_slots_that_go(qwen3_folder: Path, device: str) -> None:
    store = moeinf.ExpertStore.open(qwen3_folder)
    cache = moeinf.ExpertCache(store, device=device, slots=TOTAL)
    fill(cache)
    views = cache.views()["down"]
    before = views[3:].clone()  # one expert and two staging slots stay
    assert len(views) == TOTAL + 2
    cache.resize(1)
    assert torch.equal(views[3:], before)
    del cache
    gc.collect()
    assert torch.equal(views[3:], before)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_rows_of_a_lease_are_there_while_the_cache_shrinks(
    qwen3_folder: Path, device: str
) -> None:
    store = moeinf.ExpertStore.open(qwen3_folder)
    cache = moeinf.ExpertCache(store, device=device, slots=TOTAL)
    fill(cache)
    lease = cache.acquire(2, [0, 5])
    shrinking = threading.Thread(target=cache.resize, args=(1,))
    shrinking.start()
    while cache.slots != 1:  # it waits for the lease now
        assert shrinking.is_alive()
    down = cache.views()["down"]
    for expert, slot in zip(lease.experts, lease.slots, strict=True):
        assert torch.equal(down[slot].cpu(), store.read(2, expert)["down"])
    lease.release()
    shrinking.join(WAIT)
    assert not shrinking.is_alive()
    assert torch.isfinite(down[lease.slots]).all()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_is_given_back_once_no_view_is_left(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hidden_size=512, moe_intermediate_size=1024, num_experts=16)
    store = moeinf.ExpertStore.open(tmp_path)
    cache = moeinf.ExpertCache(store, slots=48)  # 300 MB
    with_views = cache.views()
    for layer in range(3):
        cache.acquire(layer, range(16)).release()
    full = resident_bytes()
    cache.resize(1)
    kept = resident_bytes()
    again = cache.views()
    assert len(again["down"]) == len(with_views["down"]) == 50  # one memory, kept for both
    del with_views, again
    gc.collect()
    released = resident_bytes()
    pool = 47 * store.slot_bytes
    assert kept > full - pool // 4
    assert released < full - 3 * pool // 4
    assert len(cache.pool()) == 3
    cache.resize(48)
    assert len(cache.pool()) == 50
    assert torch.equal(
        cache.views()["down"][cache.acquire(1, [7]).slots[0]], store.read(1, 7)["down"]
    )
