"""RAM that processes share by name: one copy, read once, gone with its last user."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import moeinf
from benchmarks.shared_memory import lists_of, segments_open, stress
from moeinf.errors import UnsupportedError
from moeinf.pocket import POCKET


@pytest.fixture()
def name() -> Iterator[str]:
    chosen = f"test-{os.getpid()}-{os.urandom(4).hex()}"
    yield chosen
    assert segments_open(chosen) == 0
    assert lists_of(chosen) == []


def store() -> moeinf.ExpertStore:
    return moeinf.ExpertStore.open(POCKET)


def open_memory(name: str) -> int:
    """A descriptor of its own on the memory of that name."""
    process, number = lists_of(name)[0].read_text().split()[:2]
    return os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)


def lock(descriptor: int, expert: int, kind: int) -> None:
    # struct flock, with a lock of the open file and not of the process
    fcntl.fcntl(descriptor, 37, struct.pack("hhqqi", kind, os.SEEK_SET, expert, 1, 0))


def check_expert(cache: moeinf.ExpertCache, layer: int, expert: int) -> None:
    expected = cache.store.read(layer, expert)
    with cache.acquire(layer, [expert]) as lease:
        for segment, found in cache.views().items():
            assert found[lease.slots[0]].equal(expected[segment])


def test_an_expert_is_read_once_and_seen_by_all(name: str) -> None:
    first, second = (moeinf.ExpertCache(store(), shared=name) for _ in range(2))
    check_expert(first, 1, 5)
    check_expert(second, 1, 5)
    assert first.stats()["demand_bytes"] == first.layout.nbytes
    assert second.stats()["demand_bytes"] == 0
    third = moeinf.ExpertCache(store(), shared=name)
    assert third.resident(1) == [5]
    check_expert(third, 1, 5)
    assert third.stats()["hits"] == 1
    assert segments_open(name) == 1
    del first, second
    check_expert(third, 0, 2)
    check_expert(third, 1, 5)


def test_a_model_serves_from_shared_memory(name: str) -> None:
    import torch

    alone, shared = moeinf.ExpertCache(store()), moeinf.ExpertCache(store(), shared=name)
    hidden = torch.randn(9, alone.layout.hidden, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(18, dtype=torch.int32).view(9, 2) % alone.store.num_experts
    weights = torch.full((9, 2), 0.5)
    for layer in range(2):
        expected = moeinf.fused_experts(hidden, ids, weights, alone, layer=layer)
        found = moeinf.fused_experts(hidden, ids, weights, shared, layer=layer)
        assert found.equal(expected)


def test_a_step_waits_for_an_expert_that_another_process_reads(name: str) -> None:
    cache = moeinf.ExpertCache(store(), shared=name)
    other = open_memory(name)
    lock(other, 3, fcntl.F_WRLCK)
    ready = threading.Event()

    def read() -> None:
        check_expert(cache, 0, 3)
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    check_expert(cache, 0, 4)
    assert not ready.wait(0.1)
    os.close(other)  # as at the end of a process
    assert ready.wait(20)
    reader.join()


def test_the_memory_is_of_its_user_alone(name: str) -> None:
    cache = moeinf.ExpertCache(store(), shared=name)
    other = open_memory(name)
    assert os.fstat(other).st_mode & 0o777 == 0o600
    assert lists_of(name)[0].stat().st_mode & 0o777 == 0o600
    os.close(other)
    assert cache.slots == cache.store.num_layers * cache.store.num_experts


def test_another_checkpoint_of_the_name_is_refused(name: str, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(POCKET, copy)
    cache = moeinf.ExpertCache(moeinf.ExpertStore.open(copy), shared=name)
    with pytest.raises(ValueError, match=r"has the experts of another checkpoint, or of these"):
        moeinf.ExpertCache(store(), shared=name)
    os.utime(copy / "model.safetensors", ns=(0, 12345))
    with pytest.raises(ValueError, match="before they were changed: give another name"):
        moeinf.ExpertCache(moeinf.ExpertStore.open(copy), shared=name)
    assert len(lists_of(name)[0].read_text().splitlines()) == 1
    del cache


def test_memory_of_another_version_is_refused(name: str) -> None:
    other = os.memfd_create(f"moeinf-{name}")
    os.write(other, b"moeinfsh" + struct.pack("QQQQ", 2, 0, 0, 0))
    path = Path(f"/dev/shm/moeinf-{os.geteuid()}-{name}")
    path.write_text(f"{os.getpid()} {other}\n")
    path.chmod(0o600)
    with pytest.raises(ValueError, match="another version of moeinf uses it: end that program"):
        moeinf.ExpertCache(store(), shared=name)
    os.close(other)
    check_expert(moeinf.ExpertCache(store(), shared=name), 0, 0)


def test_what_a_crash_has_left_is_not_used(name: str, tmp_path: Path) -> None:
    program = (
        "import moeinf, os, signal, sys\nfrom moeinf.pocket import POCKET\n"
        "cache = moeinf.ExpertCache(moeinf.ExpertStore.open(POCKET), shared=sys.argv[1])\n"
        "cache.acquire(0, [1]).release()\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, name], timeout=120).returncode == -9
    path = lists_of(name)[0]
    unrelated = os.open(tmp_path, os.O_RDONLY)
    path.write_text(path.read_text() + f"{os.getpid()} {unrelated}\nnonsense")
    cache = moeinf.ExpertCache(store(), shared=name)
    os.close(unrelated)
    assert cache.resident(0) == []
    check_expert(cache, 0, 1)
    assert len(path.read_text().splitlines()) == 1


def test_a_list_that_others_could_write_is_refused(name: str, tmp_path: Path) -> None:
    path = Path(f"/dev/shm/moeinf-{os.geteuid()}-{name}")
    path.write_text("")
    for mode in (0o644, 0o660):
        path.chmod(mode)
        with pytest.raises(UnsupportedError, match="this user alone can read: remove it"):
            moeinf.ExpertCache(store(), shared=name)
    path.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        with pytest.raises(UnsupportedError, match="this user alone can read: remove it"):
            moeinf.ExpertCache(store(), shared=name)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsupportedError, match="cannot be opened"):
        moeinf.ExpertCache(store(), shared=name)
    assert not (tmp_path / "elsewhere").exists()
    path.unlink()


@pytest.mark.parametrize("bad", ["a/b", "..\n", "x" * 65, "ä"])
def test_a_name_that_is_no_name_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="expected a name of 1 to 64 letters"):
        moeinf.ExpertCache(store(), shared=bad)


def test_shared_memory_has_room_for_all_and_lies_in_ram(name: str) -> None:
    for options in ({"slots": 3}, {"memory": "25%"}):
        with pytest.raises(ValueError, match=f"leave out {next(iter(options))}"):
            moeinf.ExpertCache(store(), shared=name, **options)  # type: ignore[arg-type]
    cache = moeinf.ExpertCache(store(), shared=name)
    with pytest.raises(ValueError, match="always has a slot for each expert"):
        cache.resize(3)


def test_experts_of_a_function_are_not_shared(name: str) -> None:
    own = moeinf.ExpertStore.from_callback(
        lambda *call: 0, layers=1, num_experts=2, hidden=32, intermediate=32
    )
    with pytest.raises(UnsupportedError, match="cannot be shared"):
        moeinf.ExpertCache(own, shared=name)


def test_tensors_are_shared_by_their_bytes(name: str) -> None:
    import torch

    layer = {"gate_up": torch.randn(2, 64, 32), "down": torch.randn(2, 32, 32)}
    same, other = ({key: one.clone() for key, one in layer.items()} for _ in range(2))
    other["down"][1, 3, 3] += 1
    first = moeinf.ExpertCache(moeinf.ExpertStore.from_tensors([layer]), shared=name)
    check_expert(first, 0, 1)
    second = moeinf.ExpertCache(moeinf.ExpertStore.from_tensors([same]), shared=name)
    assert second.resident(0) == [1]
    with pytest.raises(ValueError, match="another checkpoint"):
        moeinf.ExpertCache(moeinf.ExpertStore.from_tensors([other]), shared=name)


def test_killed_users_leave_no_wrong_byte_and_no_memory() -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    found = stress(POCKET, seconds=5, every=0.2, epoch=0.3, processes=3, seed=seed)
    assert found["kills"] > 2 and found["experts_compared"] > 0
    print(found)
    for key in ("wrong", "processes_that_failed", "segments_left", "lists_left"):
        assert found[key] == 0, found
