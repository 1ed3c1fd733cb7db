"""Damaged checkpoints, headers, traces and configurations; see `fuzz.py` and `mutations.py`."""

from __future__ import annotations

import random

import fuzz
import mutations
import pytest


@pytest.fixture
def seed() -> int:
    drawn = random.randrange(2**32)
    print(f"seed {drawn}")
    return drawn


def test_a_damaged_checkpoint_is_served_as_transformers_serves_it_or_refused(seed: int) -> None:
    wrong = mutations.run(20, seed, print)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind, count", [("headers", 1500), ("traces", 800), ("configs", 60)])
def test_damaged_files_are_read_right_or_refused(kind: str, count: int, seed: int) -> None:
    assert len(fuzz.run(kind, count, seed)) > 1
