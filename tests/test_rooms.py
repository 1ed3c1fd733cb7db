"""Who may know whom: reads `#include` and `import` lines and fails on a forbidden arrow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each room of csrc/ and the rooms it may include, besides itself.
ROOMS = {
    "base": set(),
    "layout": {"base"},
    "memory": {"base"},
    "device": {"base", "memory"},
    "policy": {"base"},
    "prefetch": {"base", "policy"},
    "trace": {"base", "policy"},
    "compute": {"base", "layout"},
    "transfer": {"base", "layout", "memory"},
    "tier": {"base", "layout", "memory", "device", "policy", "transfer"},
    "cache": {"base", "layout", "memory", "device", "policy", "prefetch", "transfer", "tier"},
    "cuda": {"base", "memory", "device"},
    "probe": {"base", "layout", "memory", "device", "transfer", "compute"},
}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_includes_only_rooms_it_may_know(room: str) -> None:
    for source in sorted((ROOT / "csrc" / room).rglob("*.*")):
        for included in re.findall(r'#include "([a-z_]+)/', source.read_text()):
            assert included in ROOMS[room] | {room}, f"{source} includes {included}/"


def test_only_bindings_know_python() -> None:
    for source in sorted((ROOT / "csrc").rglob("*.*")):
        if source.parent.name != "bindings" and source.suffix in {".h", ".cpp", ".cu"}:
            assert not re.search(r"#include <(pybind11|Python\.h|torch)", source.read_text()), (
                source
            )


def test_kernels_never_import_the_package() -> None:
    for source in sorted((ROOT / "kernels").rglob("*.py")):
        assert not re.search(r"^\s*(from|import) moeinf\b", source.read_text(), re.M), source


def test_nothing_imports_the_command_line() -> None:
    for source in sorted((ROOT / "moeinf").rglob("*.py")):
        if "cli" not in source.parts:
            assert not re.search(r"(from|import) moeinf\.cli", source.read_text()), source
