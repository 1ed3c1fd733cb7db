"""The file reader from Python: the bytes that arrive, refused arguments, bad files."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest

from moeinf import _core
from moeinf.errors import CapacityError, ReadError

PAGE = 4096
WAIT = 60.0  # seconds; a transfer that takes longer hangs


class FileSet:
    """Files of random bytes and experts scattered over them, with what each slot must hold."""

    def __init__(
        self,
        folder: Path,
        *,
        layers: int = 2,
        experts: int = 5,
        sizes: tuple[int, ...] = (70_001, 33_333, 4096),
        files: int = 2,
        seed: int | None = None,
    ) -> None:
        self.seed = random.randrange(1 << 30) if seed is None else seed
        print(f"seed {self.seed}")
        rng = np.random.default_rng(self.seed)
        self.layers, self.experts = layers, experts
        total = layers * experts
        self.slot_bytes = -(-(sum(sizes) + 64 * len(sizes)) // PAGE) * PAGE
        contents = [bytearray(rng.bytes(rng.integers(8, 5000))) for _ in range(files)]
        extents = np.zeros((total, len(sizes), 4), dtype=np.uint64)
        # In the slot the segments lie in the order of `sizes`; in the files in another.
        for expert in range(total):
            slot_offsets = np.cumsum([0, *(size + 64 for size in sizes[:-1])])
            for i in rng.permutation(len(sizes)):
                file = (expert + int(i)) % files
                extents[expert, i] = (file, len(contents[file]), sizes[i], slot_offsets[i])
                contents[file] += rng.bytes(sizes[i])
                contents[file] += rng.bytes(int(rng.integers(0, 100)))
        self.extents = extents
        self.contents = [bytes(content) for content in contents]
        self.paths = [folder / f"shard-{i}.bin" for i in range(files)]
        for path, content in zip(self.paths, self.contents, strict=True):
            path.write_bytes(content)

    def catalog(self) -> _core.Catalog:
        sizes = [
            (str(path), len(content))
            for path, content in zip(self.paths, self.contents, strict=True)
        ]
        return _core.Catalog(self.layers, self.experts, self.slot_bytes, sizes, self.extents)

    def check(self, expert: int, slot: np.ndarray, poison: int) -> None:
        expected = np.full(self.slot_bytes, poison, dtype=np.uint8)
        for file, offset, nbytes, place in self.extents[expert].tolist():
            content = self.contents[file][offset : offset + nbytes]
            expected[place : place + nbytes] = np.frombuffer(content, dtype=np.uint8)
        np.testing.assert_array_equal(slot, expected)


@pytest.fixture
def files(tmp_path: Path) -> FileSet:
    return FileSet(tmp_path)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("threads", "chunk_bytes"), [(1, PAGE), (3, 5 * PAGE), (0, 0)])
def test_every_expert_arrives_whole_and_nothing_else_is_touched(
    files: FileSet, direct: bool, threads: int, chunk_bytes: int
) -> None:
    engine = _core.FileReader(
        files.catalog(), threads=threads, chunk_bytes=chunk_bytes, direct=direct
    )
    total = files.layers * files.experts
    pool = _core.SlotPool(files.slot_bytes, total)
    for slot in range(total):
        pool.numpy(slot)[:] = 0xA5
    tickets = [
        engine.submit(expert, pool, total - 1 - expert, prefetch=expert % 2 == 0)
        for expert in range(total)
    ]
    for expert, ticket in enumerate(tickets):
        assert ticket.wait(WAIT)
        assert (ticket.state, ticket.error) == ("done", None)
        files.check(expert, pool.numpy(total - 1 - expert), 0xA5)


def test_buffered_reads_when_direct_ones_are_not_wanted(files: FileSet) -> None:
    engine = _core.FileReader(files.catalog(), direct=False)
    assert not engine.file_is_direct(0)
    with pytest.raises(ValueError, match="file index below 2, found 2"):
        engine.file_is_direct(2)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm here")
def test_a_file_system_without_direct_reads_is_read_through_the_cache() -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        files = FileSet(Path(folder))
        engine = _core.FileReader(files.catalog())
        assert not engine.file_is_direct(0)
        pool = _core.SlotPool(files.slot_bytes, 1)
        pool.numpy(0)[:] = 1
        assert engine.submit(3, pool, 0).wait(WAIT)
        files.check(3, pool.numpy(0), 1)


def change(extents: np.ndarray, where: tuple[int, int, int], value: int) -> np.ndarray:
    changed = extents.copy()
    changed[where] = value
    return changed


def test_extents_that_do_not_fit_are_refused_by_name(files: FileSet) -> None:
    first = f"{files.paths[0]}"
    sizes = [(str(path), path.stat().st_size) for path in files.paths]
    extents = files.extents.copy()
    extents[4, 1, 0] = 0

    def build(changed: np.ndarray, slot_bytes: int = files.slot_bytes) -> None:
        _core.Catalog(files.layers, files.experts, slot_bytes, sizes, changed)

    place = "layer 0, expert 4, extent 1"
    with pytest.raises(ValueError, match=f"leave the file {first}, which has {sizes[0][1]} bytes"):
        build(change(extents, (4, 1, 1), sizes[0][1]))
    with pytest.raises(ValueError, match=f"{place}: .* leave the file"):
        build(change(extents, (4, 1, 1), (1 << 64) - 8))
    with pytest.raises(ValueError, match=f"{place}.* leave the slot"):
        build(change(change(extents, (4, 1, 1), 0), (4, 1, 3), (1 << 64) - 8))
    with pytest.raises(ValueError, match="file index below 2, found 7"):
        build(change(extents, (4, 1, 0), 7))
    with pytest.raises(ValueError, match="at least 1 byte, found 0"):
        build(change(extents, (4, 1, 2), 0))
    with pytest.raises(ValueError, match="overlaps extent 0 in the slot"):
        build(change(change(extents, (4, 1, 1), 0), (4, 1, 3), 5))
    with pytest.raises(ValueError, match="like the first, found"):
        build(change(change(extents, (4, 1, 1), 0), (4, 1, 2), 9))
    with pytest.raises(ValueError, match="leave the slot"):
        build(extents, PAGE)
    with pytest.raises(ValueError, match=r"shape \[10, extents per expert, 4\], found \[9, 3, 4\]"):
        build(extents[:-1])
    with pytest.raises(ValueError, match="at least one layer"):
        _core.Catalog(0, 0, PAGE, sizes, np.zeros((0, 3, 4), dtype=np.uint64))


@pytest.mark.parametrize(
    "turn",
    [
        (0, 0, 4, 2),
        (0, 4, 4, 3),
        (0, 1, PAGE * 100, 1),
        (1, 1, 1, 2),
        (1 << 63, 1, 1, 1),
        (0, 1 << 63, 2, 1),
        (0, 1 << 63, 1 << 63, 4),
    ],
)
def test_a_transpose_stays_in_the_slot(turn: tuple[int, ...], files: FileSet) -> None:
    sizes = [(str(path), path.stat().st_size) for path in files.paths]
    shape = files.layers, files.experts, files.slot_bytes, sizes, files.extents
    with pytest.raises(ValueError, match="transpose of"):
        _core.Catalog(*shape, transposes=[turn])
    _core.Catalog(*shape, transposes=[(0, 2, 3, 2), (12, 2, 1, 1)])
    with pytest.raises(ValueError, match=r"at slot offset 11: .*, from 12 on"):
        _core.Catalog(*shape, transposes=[(0, 2, 3, 2), (11, 2, 1, 1)])


def test_a_missing_file_is_an_error_at_once(files: FileSet) -> None:
    files.paths[1].unlink()
    with pytest.raises(ReadError, match=r"shard-1\.bin: cannot be opened: No such file"):
        _core.FileReader(files.catalog())


def test_a_file_of_another_size_is_an_error_at_once(files: FileSet) -> None:
    catalog = files.catalog()
    with files.paths[0].open("ab") as file:
        file.write(b"more")
    found = len(files.contents[0]) + 4
    with pytest.raises(ReadError, match=f"expected a file of {found - 4} bytes, found {found}"):
        _core.FileReader(catalog)


def test_what_is_no_file_is_an_error_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        catalog = _core.Catalog(1, 1, PAGE, [(str(path), 64)], [[[0, 0, 64, 0]]])
        with pytest.raises(ReadError, match="expected a regular file"):
            _core.FileReader(catalog)


def test_a_file_removed_after_opening_still_gives_its_bytes(files: FileSet) -> None:
    engine = _core.FileReader(files.catalog())
    for path in files.paths:
        path.unlink()
        path.write_bytes(b"another file of that name")
    pool = _core.SlotPool(files.slot_bytes, 1)
    pool.numpy(0)[:] = 7
    assert engine.submit(1, pool, 0).wait(WAIT)
    files.check(1, pool.numpy(0), 7)


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_truncated_in_mid_run_fails_its_reads_and_no_others(
    tmp_path: Path, direct: bool
) -> None:
    files = FileSet(tmp_path, layers=1, experts=2, sizes=(100_000,), files=2)
    engine = _core.FileReader(files.catalog(), direct=direct, chunk_bytes=PAGE)
    os.truncate(files.paths[0], 20_000)
    pool = _core.SlotPool(files.slot_bytes, 1)
    in_first, in_second = (engine.submit(expert, pool, 0) for expert in range(2))
    assert in_first.wait(WAIT)
    assert in_first.state == "failed"
    assert str(files.paths[0]) in in_first.error
    assert in_second.wait(WAIT)
    assert in_second.state == "done"


def test_a_file_written_to_in_mid_run_fails_its_reads(tmp_path: Path) -> None:
    files = FileSet(tmp_path, layers=1, experts=1, sizes=(100_000,), files=1)
    engine = _core.FileReader(files.catalog())
    status = files.paths[0].stat()
    with files.paths[0].open("r+b") as file:
        file.write(b"other")
    os.utime(files.paths[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    ticket = engine.submit(0, _core.SlotPool(files.slot_bytes, 1), 0)
    assert ticket.wait(WAIT)
    assert ticket.state == "failed"
    assert ticket.error == f"{files.paths[0]}: was written to while open"


def test_a_pool_keeps_its_bytes_and_address_when_it_grows_and_shrinks() -> None:
    pool = _core.SlotPool(PAGE, 2, capacity=5)
    first = pool.numpy(0)
    first[:] = 42
    pool.resize(5)
    pool.numpy(4)[:] = 9
    pool.resize(1)
    assert first.min() == first.max() == 42
    assert pool.numpy(0).ctypes.data == first.ctypes.data
    with pytest.raises(IndexError):
        pool.numpy(1)
    pool.resize(5)
    assert pool.numpy(4).max() == 0  # given back in between, so it comes as zeros
    with pytest.raises(CapacityError, match="at most 5 slots cannot have 6"):
        pool.resize(6)
    assert pool.slots == 5
    with pytest.raises(ValueError, match="multiple of 4096 bytes, found 100"):
        _core.SlotPool(100, 1)


def test_more_memory_than_there_is_is_refused_and_changes_nothing() -> None:
    slot_bytes = 1 << 40
    pool = _core.SlotPool(slot_bytes, 0, capacity=16)
    with pytest.raises(CapacityError, match="bytes of memory are available"):
        pool.resize(16)
    assert pool.slots == 0


def test_the_engine_refuses_to_work_in_a_forked_child(files: FileSet) -> None:
    engine = _core.FileReader(files.catalog())
    pool = _core.SlotPool(files.slot_bytes, 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            engine.submit(0, pool, 0)
        except RuntimeError as error:
            code = 0 if "fork" in str(error) else 2
            del engine  # must not wait for threads that are not here
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ticket = engine.submit(0, pool, 0)
    assert ticket.wait(WAIT)
    assert ticket.state == "done"


def test_threads_submit_while_the_engine_reads(files: FileSet) -> None:
    engine = _core.FileReader(files.catalog(), threads=3, chunk_bytes=2 * PAGE)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            rng = random.Random(seed)
            pool = _core.SlotPool(files.slot_bytes, 2)
            for _ in range(30):
                pool.numpy(0)[:] = 5
                expert = rng.randrange(files.layers * files.experts)
                ticket = engine.submit(expert, pool, 0, prefetch=rng.random() < 0.5)
                other = engine.submit(expert, pool, 1, prefetch=True)
                engine.promote(other if rng.random() < 0.5 else ticket)
                assert ticket.wait(WAIT)
                assert other.wait(WAIT)
                assert other.state == "done"
                files.check(expert, pool.numpy(0), 5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(files.seed + i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_read_bandwidth_says_what_it_read(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * 10)
    (tmp_path / "large").write_bytes(os.urandom(3 << 20))
    result = _core.read_bandwidth(str(tmp_path), 0.1)
    assert result["path"] == str(tmp_path / "large")
    assert len(result["ways"]) > 1
    rates = [way["bytes_per_second"] for way in result["ways"]]
    assert result["bytes_per_second"] == max(rates)
    assert min(rates) > 0
    with pytest.raises(ValueError, match="found 10"):
        _core.read_bandwidth(str(tmp_path / "small"), 0.1)
    with pytest.raises(ReadError, match="absent"):
        _core.read_bandwidth(str(tmp_path / "absent"), 0.1)
