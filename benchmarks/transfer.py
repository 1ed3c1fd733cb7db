"""Disk to slot: experts read in random order, over the best large sequential read of the same run.

Makes files of random bytes that hold 9 MiB experts the way a checkpoint does (down, gate and up of
an expert side by side, at offsets that fit no block), reads experts in random order through the
copy engine into slots, and prints GB/s beside what this disk gives to large direct sequential
reads. The two are measured in turn, round after round, so that both see the same machine. Then the
latency of a demand on an idle engine and on one whose queue is full of prefetches.

    python benchmarks/transfer.py [--threads 2,4] [--chunk-kib 512,1024] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeinf import _core

SEGMENT_BYTES = (2 * 2 * 768 * 2048, 2 * 768 * 2048)  # gate_up and down of Qwen3-30B-A3B in bf16
GATE_BYTES = SEGMENT_BYTES[0] // 2
EXPERT_BYTES = sum(SEGMENT_BYTES)
SLOT_BYTES = EXPERT_BYTES  # a multiple of 4096 already
WRITE_BYTES = 64 << 20
WINDOW = 8  # experts asked for at a time, as a top-8 model does
SLOTS = 2 * WINDOW


@dataclass(frozen=True)
class Result:
    """One setting of the engine; rates are medians over rounds."""

    threads: int
    chunk_kib: int
    gb_per_s: float
    limit_gb_per_s: float
    ratio: float
    best_ratio: float


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


def read_experts(engine: _core.CopyEngine, pool: _core.SlotPool, experts: list[int]) -> float:
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
) -> list[Result]:
    """Every setting in every round, each between two measurements of the limit."""
    engines = {
        (threads, kib): _core.CopyEngine(catalog, threads=threads, chunk_bytes=kib << 10)
        for threads, kib in settings
    }
    rates: dict[tuple[int, int], list[float]] = {setting: [] for setting in settings}
    limits: dict[tuple[int, int], list[float]] = {setting: [] for setting in settings}
    total = catalog.num_layers * catalog.num_experts

    def measured_limit() -> float:
        return _core.read_bandwidth(str(args.folder), args.limit_seconds)["bytes_per_second"] / 1e9

    for _ in range(args.rounds):
        before = measured_limit()
        for setting in random.sample(settings, len(settings)):
            experts = random.sample(range(total), min(args.experts, total))
            rates[setting].append(read_experts(engines[setting], pool, experts))
            after = measured_limit()
            limits[setting].append(max(before, after))
            before = after
    results = []
    for setting in settings:
        ratios = [r / m for r, m in zip(rates[setting], limits[setting], strict=True)]
        results.append(
            Result(
                *setting,
                statistics.median(rates[setting]),
                statistics.median(limits[setting]),
                statistics.median(ratios),
                max(ratios),
            )
        )
    return results


def demand_latency(
    catalog: _core.Catalog, pool: _core.SlotPool, *, prefetches: int, count: int
) -> list[float]:
    """Milliseconds from submitting a demand to its last byte, `prefetches` waiting meanwhile."""
    engine = _core.CopyEngine(catalog)
    total = catalog.num_layers * catalog.num_experts
    waiting: deque[_core.Ticket] = deque()
    seconds = []
    for _ in range(count):
        while waiting and waiting[0].state not in ("queued", "running"):
            finish(waiting.popleft())
        while len(waiting) < prefetches:
            slot = 1 + random.randrange(SLOTS - 1)
            waiting.append(engine.submit(random.randrange(total), pool, slot, prefetch=True))
        time.sleep(random.random() * 2e-3)
        ticket = engine.submit(random.randrange(total), pool, 0)
        finish(ticket)
        seconds.append(1e3 * ticket.seconds)
    for ticket in waiting:
        engine.cancel(ticket)
    return seconds


def check_bytes(catalog: _core.Catalog, engine: _core.CopyEngine, pool: _core.SlotPool) -> None:
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


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "unknown")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


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
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--experts", type=int, default=100, help="read per setting and round")
    parser.add_argument("--limit-seconds", type=float, default=0.5, help="per measured limit")
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
    default = _core.CopyEngine(catalog)
    check_bytes(catalog, default, pool)
    settings = [
        (threads or default.threads, kib or default.chunk_bytes >> 10)
        for threads in args.threads
        for kib in args.chunk_kib
    ]
    results = throughput(catalog, pool, settings, args)
    print(
        f"\n{EXPERT_BYTES / 1e6:.1f} MB experts, random order, {WINDOW} asked for at a time, ",
        end="",
    )
    print("direct reads" if default.file_is_direct(0) else "buffered reads")
    print("threads  chunk KiB    GB/s   limit   ratio    best")
    for r in results:
        mark = (
            "  default"
            if (r.threads, r.chunk_kib << 10)
            == (
                default.threads,
                default.chunk_bytes,
            )
            else ""
        )
        print(
            f"{r.threads:7}  {r.chunk_kib:9}  {r.gb_per_s:6.2f}  {r.limit_gb_per_s:6.2f}"
            f"  {r.ratio:6.3f}  {r.best_ratio:6.3f}{mark}"
        )
    print("\ndemand latency, ms          median     p95")
    latencies = {}
    for name, prefetches in (("idle", 0), ("prefetch queue full", 24)):
        values = demand_latency(catalog, pool, prefetches=prefetches, count=args.demands)
        latencies[name] = {
            "median_ms": statistics.median(values),
            "p95_ms": statistics.quantiles(values, n=20)[-1],
        }
        print(f"{name:24}  {latencies[name]['median_ms']:8.2f}{latencies[name]['p95_ms']:8.2f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "benchmark": "transfer",
            "machine": machine(),
            "seed": args.seed,
            "direct": default.file_is_direct(0),
            "default": {"threads": default.threads, "chunk_kib": default.chunk_bytes >> 10},
            "expert_bytes": EXPERT_BYTES,
            "rounds": args.rounds,
            "throughput": [asdict(result) for result in results],
            "demand_latency": latencies,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
