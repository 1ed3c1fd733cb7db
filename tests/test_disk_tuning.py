"""How experts are read from a disk: measured by doctor, kept per user and disk, used by caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moeinf
from moeinf import _core
from moeinf.cache import disk_tuning
from moeinf.cache.disk_tuning import ROUNDS, USUAL
from moeinf.cli import doctor
from moeinf.pocket import POCKET

OTHER, THIRD = (4, 0), (0, 4 << 20)


@pytest.fixture(autouse=True)
def kept_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def read_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens a cache: the threads and the bytes of a chunk that its core was told."""
    told: dict[str, Any] = {}

    class Told(_core.ExpertCache):
        def __init__(self, *arguments: Any, **options: Any):
            told.update(options)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(_core, "ExpertCache", Told)

    def read(store: Any = None, **options: Any) -> tuple[int, int]:
        moeinf.ExpertCache(store or moeinf.ExpertStore.open(POCKET), slots=2, **options)
        return told["threads"], told["chunk_bytes"]

    return read


@pytest.mark.parametrize(
    ("usual", "other", "third", "expected"),
    [
        ([10] * ROUNDS, [12] * ROUNDS, [10] * ROUNDS, OTHER),
        ([10] * ROUNDS, [12] * ROUNDS, [13] * ROUNDS, THIRD),
        ([10] * ROUNDS, [10.9] * ROUNDS, [10] * ROUNDS, USUAL),  # by less than the margin
        ([10] * ROUNDS, [12] * (ROUNDS - 1) + [9], [1] * ROUNDS, OTHER),
        ([10] * ROUNDS, [12] * (ROUNDS - 2) + [9] * 2, [1] * ROUNDS, USUAL),  # by chance
    ],
)
def test_another_way_is_kept_only_if_it_is_surely_faster(
    usual: list[float], other: list[float], third: list[float], expected: tuple[int, int]
) -> None:
    assert disk_tuning.best({USUAL: usual, OTHER: other, THIRD: third}) == expected


def test_what_doctor_measures_caches_use(
    tmp_path: Path,
    read_with: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert read_with() == USUAL
    monkeypatch.setattr(disk_tuning, "best", lambda rates: (3, 512 << 10))
    doctor.command(POCKET, json=True)
    reader = json.loads(capsys.readouterr().out)["disk"]["reader"]
    if not reader["rows"]:
        pytest.skip("the file system of the built-in model refuses O_DIRECT")
    assert len(reader["rows"]) == len(disk_tuning.WAYS)
    assert all(row["bytes_per_second"] > 1e6 and row["threads"] for row in reader["rows"])
    assert Path(reader["kept_in"]).is_relative_to(tmp_path)
    assert read_with() == (3, 512 << 10)
    assert read_with(reader_threads=5) == (5, 0)
    assert read_with(chunk_bytes=8192) == (0, 8192)
    doctor.command(POCKET)
    assert "kept in" in " ".join(capsys.readouterr().out.split())


def test_it_counts_for_its_disk_alone(read_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_tuning.store(POCKET, {"rows": [], "threads": 3, "chunk_bytes": 0})
    assert read_with() == (3, 0)
    monkeypatch.setattr(disk_tuning, "_disk_of", lambda path: "another disk")
    assert read_with() == USUAL


def test_the_disk_is_that_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of links: the shards lie elsewhere."""
    monkeypatch.setattr(disk_tuning, "_disk_of", lambda path: str(path.resolve().parent))
    disk_tuning.KEPT.put(str(POCKET.resolve()), {"rows": [], "threads": 3, "chunk_bytes": 0})
    (tmp_path / "linked").mkdir()
    for file in POCKET.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    for folder in (POCKET, tmp_path / "linked"):
        entry = moeinf.ExpertStore.open(folder).extents(0, 0)[0].entry
        assert disk_tuning.settings(entry.path, 0, 0) == (3, 0)
    assert disk_tuning.settings(tmp_path / "gone", 0, 0) == USUAL


def test_experts_in_no_file_are_on_no_disk(read_with: Any) -> None:
    disk_tuning.store(POCKET, {"rows": [], "threads": 3, "chunk_bytes": 0})
    experts = [{"gate_up": torch.zeros(2, 8, 4), "down": torch.zeros(2, 4, 4)}]
    assert read_with(moeinf.ExpertStore.from_tensors(experts)) == USUAL


NOBODY = """
import os, sys
import moeinf
from moeinf.pocket import POCKET

def load():
    moeinf.ExpertCache(moeinf.ExpertStore.open(POCKET), slots=4)

load()  # whose modules another user may not read
os.environ.pop("XDG_CACHE_HOME", None)
os.environ["HOME"] = sys.argv[1]  # of another user
if os.getuid() == 0:
    os.setgid(54321)
    os.setuid(54321)
load()
del os.environ["HOME"]
if os.getuid() == 54321:  # who has no home
    load()
"""


def test_a_user_without_a_home_has_caches_too(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    done = subprocess.run([sys.executable, "-c", NOBODY, home], capture_output=True, text=True)
    if "Permission denied" in done.stderr and os.fspath(POCKET) in done.stderr:
        pytest.skip("another user may not read the built-in model here")
    assert done.returncode == 0, done.stderr


def test_where_it_cannot_be_kept_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file")
    doctor.command(POCKET, json=True)
    reader = json.loads(capsys.readouterr().out)["disk"]["reader"]
    assert "kept_in" not in reader and os.fspath(tmp_path) in reader["failed"]


@pytest.mark.parametrize(
    "found",
    [
        [],
        {},
        {"threads": 3},
        {"threads": -1, "chunk_bytes": 0},
        {"threads": True, "chunk_bytes": 0},
        {"threads": 3, "chunk_bytes": 1000},
        {"threads": 65, "chunk_bytes": 0},
        {"threads": 3, "chunk_bytes": 1 << 30},
        {"threads": 3, "chunk_bytes": "1MiB"},
    ],
)
def test_a_measurement_that_is_none_is_said_and_passed_over(found: Any, read_with: Any) -> None:
    disk_tuning.store(POCKET, found)
    with pytest.warns(UserWarning, match=r"disk\.json: threads and chunk_bytes.*as usual.*doctor"):
        assert read_with() == USUAL


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"format": "moeinf-disk-1"}'])
def test_a_damaged_file_is_said_and_passed_over(content: str, read_with: Any) -> None:
    disk_tuning.KEPT.path().parent.mkdir(parents=True)
    disk_tuning.KEPT.path().write_text(content)
    with pytest.warns(UserWarning, match=r"disk\.json.*as usual"):
        assert read_with() == USUAL
