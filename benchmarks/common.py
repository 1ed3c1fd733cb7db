"""Shared by the benchmarks: provenance, tables, JSON, memory in huge pages, the read limit.

A benchmark measures its own limit in the same run, in turn with the thing it measures, and prints
the ratio. Its JSON names the machine, the commit, the versions and the date.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moeinf import _core

ROOT = Path(__file__).resolve().parent.parent


def hardware() -> dict[str, Any]:
    """CPU, caches, memory and GPUs of this machine."""
    info: dict[str, Any] = {
        "cpu": _from_proc("/proc/cpuinfo", "model name") or platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_kernels": [name for name, supported in _core.cpu_kernels() if supported],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "l3_cache": _read("/sys/devices/system/cpu/cpu0/cache/index3/size"),
        "kernel": platform.release(),
    }
    if torch.cuda.is_available():
        info["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return info


def provenance() -> dict[str, Any]:
    """Hardware, commit (with "+changes" for an unclean tree), versions and the time in UTC."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "triton", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "hardware": hardware(),
        "commit": _commit(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(path: str | Path, benchmark: str, **results: Any) -> None:
    """Writes `results` under the benchmark's name, with their provenance."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": benchmark, **provenance(), **results}
    path.write_text(json.dumps(content, indent=2) + "\n")


def print_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> None:
    """Prints `rows`; `columns` maps a key to (heading, format spec). None and absent print as -."""
    cells = [[heading for heading, _ in columns.values()]]
    for row in rows:
        values = [(row.get(key), spec) for key, (_, spec) in columns.items()]
        cells.append(["-" if value is None else format(value, spec) for value, spec in values])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for i, line in enumerate(cells):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        if i == 0:
            print("  ".join("-" * width for width in widths))


def _commit() -> str | None:
    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!*.json")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _from_proc(path: str, key: str) -> str | None:
    for line in (_read(path) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
