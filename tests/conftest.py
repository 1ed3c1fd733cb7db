"""Fixtures that many tests share: a small checkpoint, and seeds that are drawn and printed."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE checkpoint: 3 layers of 6 experts, float32, one shard. Read only."""
    return write_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def seed() -> int:
    """A new seed each run; a failing test shows it."""
    drawn = random.SystemRandom().randrange(2**31)
    print(f"seed: {drawn}")
    return drawn


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of torch would spin on the cores of the engine's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt here and in children, also where a job runner ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
