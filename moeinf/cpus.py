"""How many processors this process may use."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path, PurePosixPath


def usable_cpus(proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> int:
    """Those that its affinity allows, and no more than the quota of its control groups pays for.

    A quota of half a processor is one. `proc` and `cgroups` are the folders to ask.
    """
    return max(1, math.ceil(min(allowed_cpus(), cpu_quota(proc, cgroups))))


def allowed_cpus() -> int:
    """Those that its affinity allows."""
    return len(_affinity())


def cpu_quota(proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> float:
    """Processors that the process's groups, and those above them, may use; infinity without one."""
    least = math.inf
    for line in _read(Path(proc) / "self" / "cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        inner = PurePosixPath(group.lstrip("/"))
        for root in ("", "unified", "cpu", "cpu,cpuacct"):
            # A container may see its own group as the root, so the root is asked in any case.
            for part in (inner, *inner.parents):
                least = min(least, _of_group(Path(cgroups) / root / part))
    return least


def numa_nodes(nodes: str = "/sys/devices/system/node") -> int:
    """Memory nodes that the allowed processors belong to; one where the system does not say."""
    allowed = _affinity()
    lists = [_read(one) for one in Path(nodes).glob("node[0-9]*/cpulist")]
    return max(1, sum(not allowed.isdisjoint(_cpus_in(text)) for text in lists))


def cpu_name() -> str:
    """The processor's model, as the system says it."""
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpus_in(text: str) -> set[int]:
    """Of a list such as 0-3,8."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found.update(range(int(first), int(last or first) + 1))
    return found


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _of_group(folder: Path) -> float:
    """By cpu.max of version 2 ("QUOTA PERIOD" or "max PERIOD"), or the two files of version 1."""
    numbers = _read(folder / "cpu.max").split()
    if not numbers:
        numbers = _read(folder / "cpu.cfs_quota_us").split()
        numbers += _read(folder / "cpu.cfs_period_us").split()
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        return math.inf  # "max", -1, or no such file
    quota, period = map(int, numbers)
    return quota / period if quota and period else math.inf


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
