"""Processes that share experts in RAM, and are killed: is a byte ever wrong, does memory stay?

`python -m benchmarks.shared_memory [--seconds 60] [--json FILE]`. Four processes open one name,
read every expert and compare it with the file. Once a second one of them is killed, at a random
moment, and another one begins. The name changes often, so that reads, joins and ends go on all the
time. Then four processes read all experts of one name, and their memory is summed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
import time
import zlib
from collections.abc import Iterable, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

import moeinf
from benchmarks import common
from benchmarks.random_checkpoint import Geometry, write_random_checkpoint

FORK = multiprocessing.get_context("fork")  # a process begins at once: it imports nothing
GEOMETRY = Geometry(hidden=1024, intermediate=512, experts=64, layers=4)


COUNTS = ("experts_compared", "wrong", "experts_read", "names_ended")


def checksum(pieces: Iterable[torch.Tensor]) -> int:
    return hash(tuple(zlib.crc32(one.reshape(-1).view(torch.uint8).numpy()) for one in pieces))


def slot_checksum(cache: moeinf.ExpertCache, slot: int) -> int:
    return checksum(one[slot] for one in cache.views().values())


def use(checkpoint: Path, name: str, epoch: float, expected: Any, counts: Any, seed: int) -> None:
    """Reads experts in random order, under a name of the moment, until it is killed."""
    draw = random.Random(seed)
    store = moeinf.ExpertStore.open(checkpoint)
    while True:
        moment = int(time.monotonic() / epoch)
        cache = moeinf.ExpertCache(store, shared=f"{name}-{moment}")
        experts = sorted(expected, key=lambda _: draw.random())
        while experts and int(time.monotonic() / epoch) == moment:
            layer, expert = experts.pop()
            with cache.acquire(layer, [expert]) as lease:
                right = slot_checksum(cache, lease.slots[0]) == expected[layer, expert]
            counts[0 if right else 1] += 1
        counts[2] += cache.stats()["demand_bytes"] // store.layout.nbytes
        counts[3] += 1
        del cache


def segments_open(name: str) -> int:
    """Memory of names that begin so, that any process has open now."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(link.readlink()).startswith(f"/memfd:moeinf-{name}"):
                found.add(link.stat().st_ino)
        except OSError:
            continue
    return len(found)


def lists_of(name: str) -> list[Path]:
    return sorted(Path("/dev/shm").glob(f"moeinf-{os.geteuid()}-{name}*"))


def stress(
    checkpoint: Path, *, seconds: float, every: float, epoch: float, processes: int, seed: int
) -> dict[str, Any]:
    """Counts of experts read and compared, of kills, and of what is left after the last kill."""
    draw = random.Random(seed)
    store = moeinf.ExpertStore.open(checkpoint)
    expected = {
        (layer, expert): checksum(store.read(layer, expert).values())
        for layer in range(store.num_layers)
        for expert in range(store.num_experts)
    }
    counts: list[Any] = []  # of each process its own: one that is killed holds no lock
    name = f"stress-{os.getpid()}"

    def begin() -> Any:
        counts.append(FORK.RawArray("q", len(COUNTS)))
        arguments = (checkpoint, name, epoch, expected, counts[-1], draw.randrange(2**32))
        one = FORK.Process(target=use, args=arguments, daemon=True)
        one.start()
        return one

    running = [begin() for _ in range(processes)]
    kills = unexpected = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(every * draw.uniform(0.5, 1.5))
        one = running.pop(draw.randrange(processes))
        unexpected += not one.is_alive()
        os.kill(one.pid, signal.SIGKILL)
        one.join()
        kills += 1
        running.append(begin())
    for one in running:
        unexpected += not one.is_alive()
        one.kill()
        one.join()
    left = segments_open(name)
    # Names of killed users are a few bytes each; the next user of a name drops them.
    for path in lists_of(name):
        moeinf.ExpertCache(store, shared=path.name.removeprefix(f"moeinf-{os.geteuid()}-"))
    return {
        "seconds": seconds,
        "processes": processes,
        "seed": seed,
        "kills": kills,
        **{name: sum(one[i] for one in counts) for i, name in enumerate(COUNTS)},
        "processes_that_failed": unexpected,
        "segments_left": left,
        "lists_left": len(lists_of(name)),
    }


def smaps(key: str) -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def hold(checkpoint: Path, name: str, barrier: Barrier, results: Any) -> None:
    store = moeinf.ExpertStore.open(checkpoint)
    _ = store.catalog
    before = smaps("Pss_Anon")
    cache = moeinf.ExpertCache(store, shared=name)
    for layer in range(store.num_layers):
        with cache.acquire(layer, range(store.num_experts)) as lease:
            for slot in lease.slots:
                slot_checksum(cache, slot)
    barrier.wait()
    results.put((smaps("Pss_Shmem"), smaps("Pss_Anon") - before, cache.stats()["demand_bytes"]))
    barrier.wait()


def memory(checkpoint: Path, processes: int) -> dict[str, Any]:
    """What `processes` that hold every expert take together, in copies of the experts."""
    barrier, results = FORK.Barrier(processes), FORK.Queue()
    arguments = (checkpoint, f"memory-{os.getpid()}", barrier, results)
    running = [FORK.Process(target=hold, args=arguments) for _ in range(processes)]
    for one in running:
        one.start()
    rows = [results.get(timeout=300) for _ in running]
    for one in running:
        one.join()
    store = moeinf.ExpertStore.open(checkpoint)
    one_copy = store.num_layers * store.num_experts * store.slot_bytes
    shared, own, read = (sum(column) for column in zip(*rows, strict=True))
    return {
        "processes": processes,
        "experts_bytes": one_copy,
        "shared_bytes": shared,
        "own_bytes": own,  # of caches: threads, buffers of reads, tables
        "copies": (shared + own) / one_copy,
        "copies_read": read / store.nbytes,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder)
        write_random_checkpoint(checkpoint, GEOMETRY)
        found = stress(
            checkpoint, seconds=chosen.seconds, every=1, epoch=2, processes=4, seed=chosen.seed
        )
        taken = memory(checkpoint, processes=4)
    print(found, taken, sep="\n")
    if chosen.json:
        common.write_json(chosen.json, "shared_memory", stress=found, memory=taken)


if __name__ == "__main__":
    main()
