"""Disk to slot: experts read in random order, over the best large sequential read of the same run.

    python -m benchmarks.transfer --json benchmarks/results/transfer.json
    python -m benchmarks.transfer --threads 1,2,4,8 --chunk-kib 256,512,1024,2048,4096

Writes files of random bytes with 9 MB experts, laid out as in a checkpoint: down, gate and up of an
expert side by side, at offsets that are not aligned to a block. The file reader reads experts in
random order into slots. The limit is large direct sequential reading, by the way with the best
median. In every round each setting is measured once between two measurements of the limit, all
equally short and in random order, so other work affects all of them alike. Then follows the latency
of a demand, on an idle reader and on one with a full prefetch queue.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import print_table, write_json
from moeinf import _core

SEGMENT_BYTES = (2 * 2 * 768 * 2048, 2 * 768 * 2048)  # gate_up and down of Qwen3-30B-A3B in bf16
GATE_BYTES = SEGMENT_BYTES[0] // 2
EXPERT_BYTES = sum(SEGMENT_BYTES)
SLOT_BYTES = EXPERT_BYTES  # a multiple of 4096 already
WRITE_BYTES = 64 << 20
WINDOW = 8  # experts asked for at a time, as a top-8 model does
SLOTS = 2 * WINDOW


def make_files(folder: Path, nbytes: int, files: int, rng: np.random.Generator) -> _core.Catalog:
    """Writes the files, out of the page cache, and says where their experts lie."""
    experts = nbytes // files // EXPERT_BYTES
    paths, extents = [], []
    for file in range(files):
        header = 8 * int(rng.integers(100, 5000)) + 8  # as safetensors pads it
        path = folder / f"experts-{file}.bin"
        left = header + experts * EXPERT_BYTES
        paths.append((str(path), left))
        with path.open("wb") as out:
            while left > 0:
                left -= out.write(rng.bytes(min(left, WRITE_BYTES)))
            out.flush()
            os.fsync(out.fileno())
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for expert in range(experts):
            down = header + expert * EXPERT_BYTES
            gate = down + SEGMENT_BYTES[1]
            up = gate + GATE_BYTES
            extents.append(
                [
                    (file, gate, GATE_BYTES, 0),
                    (file, up, GATE_BYTES, GATE_BYTES),
                    (file, down, SEGMENT_BYTES[1], SEGMENT_BYTES[0]),
                ]
            )
    return _core.Catalog(1, files * experts, SLOT_BYTES, paths, np.array(extents, dtype=np.uint64))


def read_experts(engine: _core.FileReader, pool: _core.SlotPool, experts: list[int]) -> float:
    """GB/s of reading these experts, WINDOW of them on their way at any time."""
    pending: deque[_core.Ticket] = deque()
    start = time.perf_counter()
    for i, expert in enumerate(experts):
        if len(pending) == WINDOW:
            finish(pending.popleft())
        pending.append(engine.submit(expert, pool, i % SLOTS))
    while pending:
        finish(pending.popleft())
    return len(experts) * EXPERT_BYTES / (time.perf_counter() - start) / 1e9


def finish(ticket: _core.Ticket) -> None:
    ticket.wait()
    if ticket.state != "done":
        raise RuntimeError(f"a read ended as {ticket.state}: {ticket.error}")


def throughput(
    catalog: _core.Catalog,
    pool: _core.SlotPool,
    settings: list[tuple[int, int]],
    args: argparse.Namespace,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row per setting, and the limit they are held against."""
    engines = {
        (threads, kib): _core.FileReader(catalog, threads=threads, chunk_bytes=kib << 10)
        for threads, kib in settings
    }
    rates: dict[tuple[int, int], list[float]] = {setting: [] for setting in settings}
    limits: dict[tuple[int, int], list[float]] = {}
    total = catalog.num_layers * catalog.num_experts

    def measure_limit(seconds: float) -> None:
        for way in _core.read_bandwidth(str(args.folder), seconds)["ways"]:
            rate = way["bytes_per_second"] / 1e9
            limits.setdefault((way["request_bytes"], way["in_flight"]), []).append(rate)

    for _ in range(args.rounds):
        for setting in random.sample(settings, len(settings)):
            start = time.perf_counter()
            experts = random.sample(range(total), min(args.experts, total))
            rates[setting].append(read_experts(engines[setting], pool, experts))
            measure_limit(5 * (time.perf_counter() - start))  # it tries five ways

    (request_bytes, in_flight), best = max(
        limits.items(), key=lambda item: statistics.median(item[1])
    )
    limit = {
        "request_bytes": request_bytes,
        "in_flight": in_flight,
        "gb_per_s": statistics.median(best),
        "best_gb_per_s": max(best),
    }
    rows = [
        {
            "threads": threads,
            "chunk_kib": kib,
            "gb_per_s": statistics.median(rates[threads, kib]),
            "best_gb_per_s": max(rates[threads, kib]),
            "ratio": statistics.median(rates[threads, kib]) / limit["gb_per_s"],
            "best_ratio": max(rates[threads, kib]) / limit["best_gb_per_s"],
        }
        for threads, kib in settings
    ]
    return rows, limit


def demand_latency(
    catalog: _core.Catalog, pool: _core.SlotPool, *, prefetches: int, count: int
) -> dict[str, float]:
    """Milliseconds from submitting a demand to its last byte, `prefetches` waiting meanwhile."""
    engine = _core.FileReader(catalog)
    total = catalog.num_layers * catalog.num_experts
    waiting: deque[_core.Ticket] = deque()
    milliseconds = []
    for _ in range(count):
        while waiting and waiting[0].state not in ("queued", "running"):
            finish(waiting.popleft())
        while len(waiting) < prefetches:
            slot = 1 + random.randrange(SLOTS - 1)
            waiting.append(engine.submit(random.randrange(total), pool, slot, prefetch=True))
        time.sleep(random.random() * 2e-3)
        ticket = engine.submit(random.randrange(total), pool, 0)
        finish(ticket)
        milliseconds.append(1e3 * ticket.seconds)
    for ticket in waiting:
        ticket.wait()
    return {
        "median_ms": statistics.median(milliseconds),
        "p95_ms": statistics.quantiles(milliseconds, n=20)[-1],
    }


def check_bytes(catalog: _core.Catalog, engine: _core.FileReader, pool: _core.SlotPool) -> None:
    """A benchmark of wrong bytes would be worth nothing."""
    expert = random.randrange(catalog.num_layers * catalog.num_experts)
    finish(engine.submit(expert, pool, 0))
    found = pool.numpy(0)
    for file, offset, nbytes, place in catalog.extents(expert).tolist():
        with Path(catalog.files[file][0]).open("rb") as source:
            source.seek(offset)
            expected = np.frombuffer(source.read(nbytes), dtype=np.uint8)
        if not np.array_equal(found[place : place + nbytes], expected):
            raise RuntimeError(f"expert {expert}: wrong bytes in the slot at {place}")


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path("build"), help="where the files are made")
    parser.add_argument("--gib", type=float, default=4.5, help="size of the file set")
    parser.add_argument("--files", type=int, default=2)
    parser.add_argument("--threads", type=integers, default=[0], help="e.g. 1,2,4; 0: the default")
    parser.add_argument("--chunk-kib", type=integers, default=[0], help="0: the default")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--experts", type=int, default=40, help="read per setting and round")
    parser.add_argument("--demands", type=int, default=60, help="per latency")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    random.seed(args.seed)
    print(f"seed {args.seed}")
    args.dir.mkdir(parents=True, exist_ok=True)
    args.folder = Path(tempfile.mkdtemp(prefix="transfer-", dir=args.dir))
    try:
        run(args)
    finally:
        shutil.rmtree(args.folder)


def run(args: argparse.Namespace) -> None:
    print(f"writing {args.gib} GiB to {args.folder}", flush=True)
    rng = np.random.default_rng(args.seed)
    catalog = make_files(args.folder, int(args.gib * (1 << 30)), args.files, rng)
    pool = _core.SlotPool(SLOT_BYTES, SLOTS)
    for slot in range(SLOTS):
        pool.numpy(slot)[:] = 1  # memory is there before the clock starts
    default = _core.FileReader(catalog)
    check_bytes(catalog, default, pool)
    settings = [
        (threads or default.threads, kib or default.chunk_bytes >> 10)
        for threads in args.threads
        for kib in args.chunk_kib
    ]
    rows, limit = throughput(catalog, pool, settings, args)
    latencies = [
        {"queue": name, **demand_latency(catalog, pool, prefetches=prefetches, count=args.demands)}
        for name, prefetches in (("idle", 0), ("full of prefetches", 24))
    ]
    how = "direct" if default.file_is_direct(0) else "buffered"
    print(
        f"\n{EXPERT_BYTES / 1e6:.1f} MB experts in random order, {WINDOW} asked for at a time, "
        f"{how} reads, medians of {args.rounds} rounds\n"
        f"limit: {limit['gb_per_s']:.2f} GB/s, {limit['in_flight']} sequential reads of "
        f"{limit['request_bytes'] >> 20} MiB at a time; default: {default.threads} threads, "
        f"{default.chunk_bytes >> 10} KiB\n"
    )
    print_table(
        rows,
        {
            "threads": ("threads", "d"),
            "chunk_kib": ("chunk KiB", "d"),
            "gb_per_s": ("GB/s", ".2f"),
            "ratio": ("over limit", ".3f"),
            "best_gb_per_s": ("best GB/s", ".2f"),
            "best_ratio": ("over best limit", ".3f"),
        },
    )
    print()
    print_table(
        latencies,
        {
            "queue": ("demand while the queue is", ""),
            "median_ms": ("median ms", ".2f"),
            "p95_ms": ("p95 ms", ".2f"),
        },
    )
    if args.json:
        write_json(
            args.json,
            "transfer",
            seed=args.seed,
            direct=default.file_is_direct(0),
            default={"threads": default.threads, "chunk_kib": default.chunk_bytes >> 10},
            expert_bytes=EXPERT_BYTES,
            file_set_gib=args.gib,
            rounds=args.rounds,
            limit=limit,
            throughput=rows,
            demand_latency=latencies,
        )


if __name__ == "__main__":
    main()
