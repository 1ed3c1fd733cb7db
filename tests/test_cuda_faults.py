"""Errors for a user of device="cuda" when a part is missing or fails, and the cache after them.

The fake driver makes each fault on demand.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_cuda_library import fake_cuda_library

import moeinf
from moeinf.errors import CapacityError, ReadError

ROOT = Path(__file__).parent.parent
OUT_OF_MEMORY, LAUNCH_FAILED = 2, 719


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    monkeypatch.setenv("MOEINF_CUDA_DRIVER", str(fake_cuda_library()))
    library = ctypes.CDLL(str(fake_cuda_library()))
    library.fake_cuda_reset(ctypes.c_uint64(1))
    yield library
    library.fake_cuda_reset(ctypes.c_uint64(1))


@pytest.fixture
def store(qwen3_folder: Path) -> moeinf.ExpertStore:
    return moeinf.ExpertStore.open(qwen3_folder)


def last_line(program: str, *arguments: str) -> str:
    """The last line of a process that fails; it uses the driver `fake`."""
    head = "import ctypes, os, sys\nfake = ctypes.CDLL(os.environ['MOEINF_CUDA_DRIVER'])\n"
    run = subprocess.run(
        [sys.executable, "-c", head + program, *arguments],
        env=os.environ | {"MOEINF_CUDA_DRIVER": str(fake_cuda_library())},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return (run.stderr or run.stdout).strip().splitlines()[-1]


LOAD = "import moeinf; moeinf.load(sys.argv[1], device='cuda', slots=2)"


def test_a_driver_that_is_too_old(qwen3_folder: Path) -> None:
    said = last_line(f"fake.fake_cuda_set_driver_version(11010); {LOAD}", str(qwen3_folder))
    assert said.startswith("moeinf.errors.UnsupportedError")
    assert "11.1" in said and "11.2" in said


def test_no_device(qwen3_folder: Path) -> None:
    said = last_line(f"fake.fake_cuda_set_device_count(0); {LOAD}", str(qwen3_folder))
    assert said.startswith("moeinf.errors.UnsupportedError")
    assert "no device" in said


def test_a_fork_after_the_first_use(qwen3_folder: Path) -> None:
    program = """
import moeinf
cache = moeinf.ExpertCache(moeinf.ExpertStore.open(sys.argv[1]), device='cuda', slots=2)
if os.fork() == 0:
    told = 0
    for use in (
        lambda: cache.acquire(0, [1]),
        lambda: moeinf.ExpertCache(cache.store, device='cuda', slots=2),
    ):
        try:
            use()
        except moeinf.UnsupportedError as error:
            told += 'fork' in str(error)
    os._exit(told)
child = os.waitstatus_to_exitcode(os.wait()[1])
assert child == 2, child
with cache.acquire(0, [1]):
    print('the parent goes on')
"""
    assert last_line(program, str(qwen3_folder)) == "the parent goes on"
    assert last_line(program + "raise SystemExit(' '.join(['over']))", str(qwen3_folder)) == "over"


def test_out_of_memory_at_the_start(fake: ctypes.CDLL, store: moeinf.ExpertStore) -> None:
    fake.fake_cuda_set_memory(ctypes.c_uint64(1))
    with pytest.raises(CapacityError, match=r"two staging slots.*1 bytes are available"):
        moeinf.ExpertCache(store, device="cuda", slots=store.num_layers * store.num_experts)
    fake.fake_cuda_reset(ctypes.c_uint64(1))
    assert moeinf.ExpertCache(store, device="cuda", slots=18).slots == 18


def test_out_of_memory_at_a_resize(fake: ctypes.CDLL, store: moeinf.ExpertStore) -> None:
    fake.fake_cuda_set_granularity(ctypes.c_uint64(4096))
    cache = moeinf.ExpertCache(store, device="cuda", slots=2)
    before = compute(cache, 0, 3)
    used = fake.fake_cuda_used_bytes
    used.restype = ctypes.c_uint64
    fake.fake_cuda_set_memory(ctypes.c_uint64(used() + store.slot_bytes))
    with pytest.raises(CapacityError, match="cannot grow a device arena"):
        cache.resize(10)
    assert cache.slots == 2
    assert torch.equal(compute(cache, 0, 3), before)


def compute(cache: moeinf.ExpertCache, layer: int, expert: int) -> torch.Tensor:
    hidden = torch.linspace(-1, 1, 40)[None]
    return moeinf.fused_experts(hidden, torch.tensor([[expert]]), torch.ones(1, 1), cache, layer)


def test_a_copy_that_fails_fails_its_step(fake: ctypes.CDLL, store: moeinf.ExpertStore) -> None:
    expected = compute(moeinf.ExpertCache(store, device="cuda", slots=2), 1, 4)
    cache = moeinf.ExpertCache(store, device="cuda", slots=2)
    assert fake.fake_cuda_fail(b"cuMemcpyHtoDAsync_v2", ctypes.c_uint64(1), LAUNCH_FAILED) == 0
    with pytest.raises(ReadError, match="cuMemcpyHtoDAsync"):
        compute(cache, 1, 4)
    assert torch.equal(compute(cache, 1, 4), expected)


def limit_pinned_to(fake: ctypes.CDLL, nbytes: int) -> None:
    """A limit above the memory of caches that were not collected yet."""
    fake.fake_cuda_registered_bytes.restype = ctypes.c_uint64
    held = fake.fake_cuda_registered_bytes()
    fake.fake_cuda_set_pinned_limit(ctypes.c_uint64(held + nbytes))


def test_pinned_memory_refused(fake: ctypes.CDLL, store: moeinf.ExpertStore) -> None:
    expected = compute(moeinf.ExpertCache(store, device="cuda", slots=2), 2, 5)
    gc.collect()  # or a cache of another test may give its memory back behind the limit
    limit_pinned_to(fake, 8 * store.slot_bytes)
    with pytest.warns(UserWarning, match=r"page-locked RAM for 18 experts was refused; \d are"):
        cache = moeinf.ExpertCache(store, device="cuda", slots=2)
    host = cache.stats()["host"]
    assert 4 <= host["slots"] <= 8
    assert host["slots"] + host["slots_refused"] == 18
    assert torch.equal(compute(cache, 2, 5), expected)
    limit_pinned_to(fake, store.slot_bytes)
    with pytest.raises(CapacityError, match="page-lock"):
        moeinf.ExpertCache(store, device="cuda", slots=2)
