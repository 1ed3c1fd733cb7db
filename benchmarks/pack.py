"""How fast `moeinf.pack` writes, against the slower of the disk's read and write rates.

    python -m benchmarks.pack --json benchmarks/results/pack.json

A random checkpoint with the geometry of Qwen3-30B-A3B is packed as it is, and then in every format.
In each round the disk's rates are measured right before: large direct reads of the source, and
large direct writes of a new file, each with nothing beside it. A pack reads and writes at the same
time, for which the disk may have no more than for one of them. So a bare copy is measured too: the
same reads and writes in the same threads, and nothing else. The rate of a pack is bytes of the
source per second, from the call to its return.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import moeinf
from benchmarks.common import print_table, write_json
from benchmarks.random_checkpoint import Geometry, write_random_checkpoint
from moeinf import _core
from moeinf.packing.making import COPIERS
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
        copy = write_rate(arguments.dir / "sample", sorted(source.glob("*.safetensors"))[0])
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
                    "copy_gb_s": copy / 1e9,
                    "pack_gb_s": rate / 1e9,
                    "ratio": rate / min(read, write),
                    "of_copy": rate / copy,
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
            "copy_gb_s": ("bare copy", ".2f"),
            "pack_gb_s": ("pack", ".2f"),
            "ratio": ("of the slower", ".2f"),
            "of_copy": ("of the copy", ".2f"),
            "error": ("output error", ".2%"),
        },
    )
    if arguments.json:
        write_json(arguments.json, "pack", layers=arguments.layers, rows=rows)


def write_rate(path: Path, source: Path | None = None) -> float:
    """Bytes per second of large direct writes, of what is read from `source` if there is one."""
    buffers = Buffers(BLOCK)
    found = os.open(source, os.O_RDONLY | os.O_DIRECT) if source else None
    nbytes = min(SAMPLE, source.stat().st_size) // BLOCK * BLOCK if source else SAMPLE

    def write(offset: int) -> None:
        block = buffers.at(offset, BLOCK)
        if found is None:
            block.fill_(1)
        elif os.preadv(found, [block.numpy().data], offset) != BLOCK:
            raise SystemExit(f"{source}: is shorter than it was")
        writer.write(offset, block)

    start = time.perf_counter()
    writer = FileWriter(path, nbytes)
    for _ in in_threads([lambda o=o: write(o) for o in range(0, nbytes, BLOCK)], COPIERS):
        pass
    writer.sync()
    writer.close()
    rate = nbytes / (time.perf_counter() - start)
    path.unlink()
    if found is not None:
        os.close(found)
    return rate


if __name__ == "__main__":
    main()
