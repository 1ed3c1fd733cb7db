"""Files that results are written to keep their links, modes and devices, and are never half."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from moeinf.output_files import check_writable, replacing
from moeinf.traces.eam import EAMC
from moeinf.traces.trace import Trace

TRACE = Trace.from_arrays(np.zeros((3, 2, 1), np.int16), num_experts=4)


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> object:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_new_file_has_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    TRACE.save(tmp_path / "t")
    EAMC.from_traces([TRACE]).save(tmp_path / "e")
    assert mode_of(tmp_path / "t") == mode_of(tmp_path / "e") == 0o666 & ~umask
    assert names(tmp_path) == ["e", "t"], "nothing else is left behind"


def test_an_older_file_keeps_its_mode_and_a_link_stays(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to("real")
    TRACE.save(link)
    assert link.is_symlink() and mode_of(real) == 0o640
    assert Trace.load(real).num_tokens == 3


def test_a_dangling_link_gets_its_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("later")
    TRACE.save(tmp_path / "link")
    assert Trace.load(tmp_path / "later").num_tokens == 3
    (tmp_path / "astray").symlink_to("no/such/x")
    with pytest.raises(FileNotFoundError, match=r"astray: cannot be written, for .*no/such is not"):
        TRACE.save(tmp_path / "astray")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes")
def test_a_device_is_written_to(tmp_path: Path) -> None:
    node = tmp_path / "null"
    os.mknod(node, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    TRACE.save(node)
    assert stat.S_ISCHR(node.lstat().st_mode)


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        TRACE.save(f"/proc/self/fd/{writer}")
        os.close(writer)
        with open(reader, "rb", closefd=False) as file:
            (tmp_path / "t").write_bytes(file.read())
    finally:
        os.close(reader)
    assert Trace.load(tmp_path / "t").num_tokens == 3


def test_what_fails_half_way_leaves_the_older_file(tmp_path: Path) -> None:
    target = tmp_path / "t"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(target) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    with (
        pytest.raises(OSError, match=r"/t: cannot be written: No space left on device"),
        replacing(target) as part,
    ):
        raise OSError(28, "No space left on device")
    assert target.read_text() == "old" and names(tmp_path) == ["t"]


def test_two_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "t"
    with replacing(target) as first, replacing(target) as second:
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first" and names(tmp_path) == ["t"]


def test_targets_are_checked_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new")
    check_writable(Path("/dev/null"))
    with pytest.raises(IsADirectoryError, match="expected a file, found a folder"):
        check_writable(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        check_writable(tmp_path / "a" / "b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_what_may_not_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("old")
    (tmp_path / "t").chmod(0o444)
    with pytest.raises(PermissionError, match="permission denied"):
        TRACE.save(tmp_path / "t")
