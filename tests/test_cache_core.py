"""The cache core from Python: leases and their bytes, what torch sees, errors, threads, Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import moeinf
from moeinf import _core
from moeinf.errors import CapacityError, ReadError, UnsupportedError

LAYERS, EXPERTS, SIZES = 2, 9, (6001, 2777)
SLOT_BYTES = 12288
PLACES = (0, 6100)


class World:
    """Experts of random bytes in two files: in-layer ids that are odd lie in the second."""

    def __init__(self, folder: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        contents = [bytearray(b"head"), bytearray(b"header")]
        extents = np.zeros((LAYERS * EXPERTS, len(SIZES), 4), dtype=np.uint64)
        for expert in range(LAYERS * EXPERTS):
            content = contents[expert % EXPERTS % 2]
            for i, size in enumerate(SIZES):
                file = expert % EXPERTS % 2
                extents[expert, i] = (file, len(content), size, PLACES[i])
                content += rng.bytes(size)
        self.contents = [bytes(content) for content in contents]
        self.paths = [folder / f"shard-{i}.bin" for i in range(2)]
        for path, content in zip(self.paths, self.contents, strict=True):
            path.write_bytes(content)
        self.extents = extents.astype(np.int64)
        files = [(str(p), len(c)) for p, c in zip(self.paths, self.contents, strict=True)]
        self.catalog = _core.Catalog(LAYERS, EXPERTS, SLOT_BYTES, files, extents)
        self.expert_bytes = sum(SIZES)

    def cache(self, slots: int, policy: str = "lru") -> _core.ExpertCache:
        return _core.ExpertCache(self.catalog, slots, policy, threads=2)

    def check(self, pool: torch.Tensor, row: int, layer: int, expert: int) -> None:
        for file, offset, size, place in self.extents[layer * EXPERTS + expert]:
            found = pool[row, place : place + size].numpy().tobytes()
            assert found == self.contents[file][offset : offset + size], (layer, expert)


@pytest.fixture
def world(tmp_path: Path, seed: int) -> World:
    return World(tmp_path, seed)


@pytest.mark.parametrize("policy", _core.policy_names())
@pytest.mark.parametrize("slots", [1, 2, 7, LAYERS * EXPERTS])
def test_every_expert_of_every_step_arrives_with_its_bytes(
    world: World, policy: str, slots: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    cache = world.cache(slots, policy)
    pool = torch.from_dlpack(cache)
    accesses = 0
    for step in range(30):
        layer = step % LAYERS
        experts = rng.permutation(EXPERTS)[: rng.integers(1, EXPERTS + 1)]
        accesses += len(experts)
        seen = []
        with cache.begin_step(layer, experts) as lease:
            while (ready := lease.wait_ready()) is not None:
                for position, row in ready:
                    world.check(pool, row, layer, int(experts[position]))
                    lease.release(position)
                    seen.append(position)
        assert sorted(seen) == list(range(len(experts)))
    stats = cache.stats()
    assert sum(layer["accesses"] for layer in stats) == accesses
    assert sum(layer["hits"] + layer["misses"] for layer in stats) == accesses
    misses = sum(layer["misses"] for layer in stats)
    assert sum(layer["demand_bytes"] for layer in stats) == misses * world.expert_bytes
    cache.reset_stats()
    assert all(value == 0 for layer in cache.stats() for value in layer.values())


@pytest.mark.parametrize(
    "experts",
    [
        [4, 0, 7],
        (4, 0, 7),
        np.array([4, 0, 7], dtype=np.int64),
        np.array([4, 0, 7], dtype=np.int32),
        np.array([4, 9, 0, 9, 7, 9], dtype=np.int64)[::2],
        torch.tensor([4, 0, 7]).numpy(),
    ],
    ids=["list", "tuple", "int64", "int32", "strided", "torch"],
)
def test_ids_may_be_any_sequence_or_integer_array(world: World, experts: object) -> None:
    cache = world.cache(5)
    lease, slots = cache.acquire(1, experts)
    pool = torch.from_dlpack(cache)
    for row, expert in zip(slots, [4, 0, 7], strict=True):
        world.check(pool, row, 1, expert)
    lease.release()
    assert cache.resident(1) == [0, 4, 7]
    assert cache.resident(0) == []


def test_the_package_leases_what_the_core_does(qwen3_folder: Path) -> None:
    store = moeinf.ExpertStore.open(qwen3_folder)
    cache = moeinf.ExpertCache(store, slots=2)
    for experts in ([1, 4], [4, 0], [5]):
        with cache.acquire(2, experts) as lease:
            assert lease.experts == experts
            for expert, slot in zip(experts, lease.slots, strict=True):
                for name, tensor in store.read(2, expert).items():
                    assert torch.equal(cache.views()[name][slot], tensor)
    for lease in cache.waves(1, [0, 1, 2, 3, 4, 5]):
        for expert, slot in zip(lease.experts, lease.slots, strict=True):
            assert torch.equal(cache.views()["down"][slot], store.read(1, expert)["down"])


def test_a_leased_slot_survives_any_pressure(world: World) -> None:
    cache = world.cache(3)
    pool = torch.from_dlpack(cache)
    lease, (row,) = cache.acquire(0, [5])
    for step in range(20):
        with cache.begin_step(step % LAYERS, list(range(EXPERTS))) as other:
            while (ready := other.wait_ready()) is not None:
                for position, _ in ready:
                    other.release(position)
        cache.prefetch(1, [1, 2, 3])
        world.check(pool, row, 0, 5)
    lease.release()


def test_torch_and_numpy_see_the_pool_itself(world: World) -> None:
    cache = world.cache(4)
    pool = torch.from_dlpack(cache)
    assert pool.shape == (cache.staging_slots + 4, SLOT_BYTES)
    assert pool.dtype == torch.uint8
    assert pool.data_ptr() == cache.address
    assert np.from_dlpack(cache).ctypes.data == cache.address
    assert torch.from_dlpack(cache.__dlpack__()).data_ptr() == cache.address
    with pytest.raises(BufferError):
        cache.__dlpack__(copy=True)
    with pytest.raises(BufferError):
        cache.__dlpack__(dl_device=(2, 0))
    address = cache.address
    cache.resize(9)
    assert cache.address == address
    lease, (row,) = cache.acquire(0, [1])
    pool = torch.from_dlpack(cache)
    assert len(pool) == cache.staging_slots + 9
    unclaimed = cache.__dlpack__()
    del lease, cache, unclaimed
    world.check(pool, row, 0, 1)  # the view keeps the memory


def test_what_does_not_fit_is_refused_and_leaves_the_cache_usable(world: World) -> None:
    with pytest.raises(ValueError, match="1 to 18 slots, not 0"):
        world.cache(0)
    with pytest.raises(ValueError, match="lru, lfu, decayed_lfu"):
        world.cache(1, "random")
    cache = world.cache(2)
    with pytest.raises(CapacityError, match="3 experts at once does not fit into 2 slots"):
        cache.acquire(0, [0, 1, 2])
    with pytest.raises(ValueError, match=r"0\.\.8 of layer 1, found 9"):
        cache.begin_step(1, [0, 9])
    with pytest.raises(ValueError, match=r"layer in 0\.\.1, found 2"):
        cache.begin_step(2, [0])
    with pytest.raises(ValueError, match="named twice"):
        cache.begin_step(0, [3, 3])
    with pytest.raises(ValueError, match="32 bits"):
        cache.begin_step(0, [1 << 40])
    with pytest.raises(TypeError, match="float"):
        cache.begin_step(0, np.array([1.0, 2.0]))
    with pytest.raises(TypeError):
        cache.begin_step(0, ["one"])
    with pytest.raises(TypeError, match="sequence of ints"):
        cache.begin_step(0, 3)
    assert cache.stats()[0]["accesses"] == 0
    held, _ = cache.acquire(0, [0, 1])
    with pytest.raises(CapacityError, match="other leases hold 2"):
        cache.acquire(0, [2])
    with pytest.raises(CapacityError, match="own leases"):
        cache.resize(1)
    assert cache.slots == 2
    held.release()
    with pytest.raises(ValueError, match="released"):
        held.wait_ready()
    cache.acquire(0, [2])[0].release()


def test_a_failed_read_fails_its_step_only(world: World) -> None:
    cache = world.cache(3)
    pool = torch.from_dlpack(cache)
    status = world.paths[1].stat()
    os.truncate(world.paths[1], 100)
    for _ in range(3):
        with pytest.raises(ReadError, match="shard-1"):
            cache.acquire(0, [2, 3])
        with (
            cache.begin_step(0, [1, 3, 5, 7, 2]) as lease,
            pytest.raises(ReadError, match="shard-1"),
        ):
            while lease.wait_ready() is not None:
                pass
        lease, (row,) = cache.acquire(0, [4])
        world.check(pool, row, 0, 4)
        lease.release()
    assert not set(cache.resident(0)) & {1, 3, 5, 7}
    world.paths[1].write_bytes(world.contents[1])
    os.utime(world.paths[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    lease, (row,) = cache.acquire(0, [3])
    world.check(pool, row, 0, 3)


def test_prefetched_bytes_are_useful_or_wasted(world: World) -> None:
    cache = world.cache(3)
    assert cache.prefetch(1, [0, 2, 4, 6]) == 3  # the fourth finds every slot in use
    assert cache.prefetch(1, np.array([0, 2])) == 0
    while len(cache.resident(1)) < 3:
        time.sleep(0.001)
    cache.acquire(1, [2])[0].release()
    cache.acquire(0, [0, 2, 4])[0].release()
    stats = cache.stats()[1]
    assert stats["hits"] == 1
    assert stats["evictions"] == 3
    assert stats["prefetch_bytes"] == 3 * world.expert_bytes
    assert stats["prefetch_useful_bytes"] == world.expert_bytes
    assert stats["prefetch_wasted_bytes"] == 2 * world.expert_bytes


def test_threads_share_a_tiny_cache(world: World, seed: int) -> None:
    cache = world.cache(3, "decayed_lfu")
    pool = torch.from_dlpack(cache)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        rng = np.random.default_rng(seed + number)
        try:
            for step in range(40):
                layer = int(rng.integers(LAYERS))
                if step % 2:
                    experts = rng.permutation(EXPERTS)[:3]
                    lease, slots = cache.acquire(layer, experts)
                    for row, expert in zip(slots, experts, strict=True):
                        world.check(pool, row, layer, int(expert))
                    lease.release()
                    continue
                experts = rng.permutation(EXPERTS)[: rng.integers(1, EXPERTS)]
                with cache.begin_step(layer, experts) as lease:
                    while (ready := lease.wait_ready()) is not None:
                        for position, row in ready:
                            world.check(pool, row, layer, int(experts[position]))
                            lease.release(position)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_wait(world: World) -> None:
    cache = world.cache(2)
    holding, finished = threading.Event(), threading.Event()

    def hold() -> None:
        lease, _ = cache.acquire(0, [0, 1])
        holding.set()
        finished.wait()
        lease.release()

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        cache.acquire(0, [2, 3])
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        cache.resize(1)
    assert cache.slots == 2
    finished.set()
    thread.join()
    cache.acquire(0, [2, 3])[0].release()


def test_a_forked_child_is_told(world: World) -> None:
    cache = world.cache(2)
    lease, _ = cache.acquire(0, [0])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            cache.acquire(0, [1])
        except UnsupportedError:
            del lease, cache
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    lease.release()
