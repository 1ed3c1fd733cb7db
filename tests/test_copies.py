"""A second copy of a checkpoint: verified, read too, and either disk may fail in mid-run."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from gguf_files import write_gguf

import moeinf
from moeinf.checkpoint.store import ExpertStore
from moeinf.errors import CheckpointError, ReadError

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files. Read only."""
    folder = write_checkpoint(tmp_path_factory.mktemp("sharded"), max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "copy"))


def refusal(path: Path, also: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        ExpertStore.open(path, also=also).catalog  # noqa: B018
    return str(error.value)


def some_file(folder: Path) -> Path:
    """A file with experts in it, neither the first nor the last."""
    return sorted(folder.glob("*.safetensors"))[1]


def change(path: Path, offset: int) -> None:
    """Another byte there, and the times that the file had."""
    status = path.stat()
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0xFF
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def tokens_of(model: object, new: int = 12) -> list[int]:
    return model.generate(PROMPT, max_new_tokens=new, do_sample=False)[0].tolist()  # type: ignore[attr-defined]


@pytest.mark.parametrize("part", ["all files", "one file"])
def test_both_disks_are_read_and_tokens_are_the_same(sharded: Path, copy: Path, part: str) -> None:
    expected = tokens_of(moeinf.load(sharded, device="cpu"))
    if part == "one file":
        for file in copy.iterdir():
            if file != some_file(copy):
                file.unlink()
    model = moeinf.load(sharded, device="cpu", slots=2, also=[copy], chunk_bytes=4096)
    assert tokens_of(model) == expected
    places = model.moeinf.stats()["places"]
    assert [row["path"] for row in places] == [str(sharded), str(copy)]
    assert all(row["read_bytes"] > 0 and row["bytes_per_second"] > 0 for row in places)
    assert all(row["failure"] == "" for row in places)
    model.moeinf.reset_stats()
    assert [row["read_bytes"] for row in model.moeinf.stats()["places"]] == [0, 0]


@pytest.mark.parametrize("broken", ["copy", "original"])
def test_a_disk_that_fails_in_mid_run_changes_no_token(
    sharded: Path, copy: Path, tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = Path(shutil.copytree(sharded, tmp_path / "own"))
    expected = tokens_of(moeinf.load(own, device="cpu"), 24)
    model = moeinf.load(own, device="cpu", slots=2, also=copy, chunk_bytes=4096)
    assert tokens_of(model) == expected[: PROMPT.shape[1] + 12]
    failed = copy if broken == "copy" else own
    for file in failed.glob("*.safetensors"):
        os.truncate(file, 1000)
    with caplog.at_level(logging.WARNING, "moeinf"):
        assert tokens_of(model, 24) == expected
        stats = model.moeinf.stats()["places"]
    one = next(row for row in stats if row["path"] == str(failed))
    assert str(failed) in one["failure"]
    warned = [record.getMessage() for record in caplog.records if "a read failed" in record.msg]
    assert len(warned) == 1 and warned[0].startswith(f"{failed}: ")
    # The other one too: the error names both.
    for file in (own if broken == "copy" else copy).glob("*.safetensors"):
        os.truncate(file, 1000)
    with pytest.raises(ReadError) as error:
        tokens_of(model)
    assert str(own) in str(error.value) and str(copy) in str(error.value)


def test_a_truncated_copy_is_refused(sharded: Path, copy: Path) -> None:
    file = some_file(copy)
    size = file.stat().st_size
    os.truncate(file, size - 1)
    assert refusal(sharded, copy) == (
        f"{file}: expected {size} bytes, as {sharded / file.name} has, found {size - 1}"
    )


def test_an_older_copy_is_refused(sharded: Path, tmp_path: Path) -> None:
    """Of the same names, sizes and headers; the weights are others."""
    older = write_checkpoint(tmp_path / "older", seed=1, max_shard_size="40KB")
    message = refusal(sharded, older)
    assert message.startswith(f"{older}/model-0") and "expected the experts of" in message
    assert "is 0x" in message and "found 0x" in message


def test_another_header_is_refused(sharded: Path, copy: Path) -> None:
    file = some_file(copy)
    offset = file.read_bytes().index(b"weight")
    change(file, offset)
    assert f"{file}: expected the header of {sharded / file.name}, byte {offset} is 0x77" in (
        refusal(sharded, copy)
    )


def test_another_checkpoint_is_refused(sharded: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", max_shard_size="40KB", hidden_size=24)
    names = sorted(file.name for file in sharded.glob("*.safetensors"))
    for i, file in enumerate(sorted(other.glob("*.safetensors"))):
        file.rename(other / names[i])
    message = refusal(sharded, other)
    assert message.startswith(f"{other}/") and "bytes, as" in message


def test_what_is_no_copy_is_refused(sharded: Path, tmp_path: Path) -> None:
    assert "found no such path" in refusal(sharded, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "found none of them" in refusal(sharded, tmp_path / "empty")
    assert f"found {sharded}/model-0" in refusal(sharded, sharded)
    link = tmp_path / "link"
    link.symlink_to(sharded)
    assert "expected a copy on another disk" in refusal(sharded, link)


def test_a_copy_that_changes_before_it_is_opened_is_refused(sharded: Path, copy: Path) -> None:
    store = ExpertStore.open(sharded, also=[copy])
    assert store.catalog.num_experts > 0
    some_file(copy).touch()
    with pytest.raises(ReadError, match="was written to after the checkpoint was opened"):
        moeinf.ExpertCache(store, slots=2)


def test_a_gguf_file_may_have_a_copy(tmp_path: Path) -> None:
    own = tmp_path / "model.gguf"
    write_gguf(own)
    (tmp_path / "other").mkdir()
    copy = Path(shutil.copy(own, tmp_path / "other"))
    expected = tokens_of(moeinf.load(own, device="cpu"))
    model = moeinf.load(own, device="cpu", slots=2, also=copy, chunk_bytes=4096)
    assert tokens_of(model) == expected
    assert all(row["read_bytes"] > 0 for row in model.moeinf.stats()["places"])
    raw = copy.read_bytes()
    change(copy, raw.index(b"general.architecture"))
    with pytest.raises(CheckpointError, match="expected the header of"):
        moeinf.load(own, device="cpu", also=copy)


def test_the_command_takes_a_copy(tmp_path: Path) -> None:
    from moeinf.pocket import POCKET

    (tmp_path / "copy").mkdir()
    shutil.copy(POCKET / "model.safetensors", tmp_path / "copy")
    command = [sys.executable, "-m", "moeinf.cli", "run", "--max-new-tokens", "3", "--json"]
    both = ["--also", str(tmp_path / "copy"), "--also", str(tmp_path)]
    ran = subprocess.run([*command, *both], capture_output=True, text=True, check=False)
    assert ran.returncode != 0  # the first one is good, the second is none
    assert f"{tmp_path}: expected a copy of files with experts" in ran.stderr
