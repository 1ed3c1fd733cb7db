"""The library logs by the standard module, under names of its own; it prints nothing."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest

import moeinf
from moeinf.pocket import POCKET

ROOT = Path(moeinf.__file__).parent


def test_a_cache_says_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "moeinf"):
        cache = moeinf.ExpertCache(moeinf.ExpertStore.open(POCKET), slots=5, policy="lru")
    (record,) = [one for one in caplog.records if one.name == "moeinf.cache"]
    expected = f"cache {cache.name}: 5 of 256 experts in slots on cpu, policy lru"
    assert record.getMessage() == expected
    assert not logging.getLogger("moeinf").handlers, "handlers are the program's"


def test_nothing_but_the_commands_prints() -> None:
    for file in ROOT.rglob("*.py"):
        if "cli" in file.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), file
