"""How fast `moeinf.pack` writes, against the slower of the disk's read and write rates.

    python -m benchmarks.pack --json benchmarks/results/pack.json

A random checkpoint with the geometry of Qwen3-30B-A3B is packed as it is, and then in every format.
In each round the disk's rates are measured right before: large direct reads of the source, and
large direct writes of a new file, each with nothing beside it. A pack reads and writes at the same
time. The rate of a pack is bytes of the source per second, from the call to its return.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import moeinf
from benchmarks.common import print_table, write_json
from benchmarks.random_checkpoint import Geometry, write_random_checkpoint
from moeinf import _core
from moeinf.packing.targets import TARGETS
from moeinf.packing.writer import Buffers, FileWriter, in_threads

BLOCK = 16 << 20
SAMPLE = 2 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("build/bench"), help="9 GB by default")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    source = arguments.dir / f"pack-{arguments.layers}-layers"
    write_random_checkpoint(source, Geometry(layers=arguments.layers))
    dest = arguments.dir / "packed"
    rows: list[dict[str, Any]] = []
    formats = [None, *(name for name in TARGETS if name != "bf16")]
    for number in range(arguments.rounds):
        read = _core.read_bandwidth(str(source), 2.0)["bytes_per_second"]
        write = write_rate(arguments.dir / "sample")
        for name in formats if number == 0 else [None]:
            shutil.rmtree(dest, ignore_errors=True)
            start = time.perf_counter()
            report = moeinf.pack(source, dest, format=name)
            rate = report.source_bytes / (time.perf_counter() - start)
            rows.append(
                {
                    "format": name or "as it is",
                    "gb": report.bytes / 1e9,
                    "read_gb_s": read / 1e9,
                    "write_gb_s": write / 1e9,
                    "pack_gb_s": rate / 1e9,
                    "ratio": rate / min(read, write),
                    "error": statistics.mean(report.errors.values()) if report.errors else None,
                }
            )
    shutil.rmtree(dest)
    print_table(
        rows,
        {
            "format": ("format", ""),
            "gb": ("GB written", ".2f"),
            "read_gb_s": ("disk read GB/s", ".2f"),
            "write_gb_s": ("write", ".2f"),
            "pack_gb_s": ("pack", ".2f"),
            "ratio": ("of the slower", ".2f"),
            "error": ("output error", ".2%"),
        },
    )
    if arguments.json:
        write_json(arguments.json, "pack", layers=arguments.layers, rows=rows)


def write_rate(path: Path) -> float:
    """Bytes per second of large direct writes."""
    buffers = Buffers(BLOCK)

    def write(offset: int) -> None:
        writer.write(offset, buffers.at(offset, BLOCK).fill_(1))

    start = time.perf_counter()
    writer = FileWriter(path, SAMPLE)
    for _ in in_threads([lambda o=o: write(o) for o in range(0, SAMPLE, BLOCK)], 4):
        pass
    writer.sync()
    writer.close()
    rate = SAMPLE / (time.perf_counter() - start)
    path.unlink()
    return rate


if __name__ == "__main__":
    main()
