"""A server on the built-in model with a quarter of its experts in memory, for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from running import Running, running

import moeinf
from moeinf.integrations.transformers.generation import read_tokenizer
from moeinf.pocket import POCKET


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return read_tokenizer(POCKET)


@pytest.fixture(scope="session")
def model() -> Any:
    return moeinf.load(POCKET, memory="25%")


@pytest.fixture(scope="session")
def served(model: Any, tokenizer: Any) -> Iterator[Running]:
    """One server for most tests: short patience, small limits."""
    with running(
        model,
        tokenizer,
        queue=40,
        prompt_tokens=200,
        new_tokens=400,
        body_bytes=20_000,
        header_seconds=1,
        body_seconds=1,
    ) as one:
        yield one
