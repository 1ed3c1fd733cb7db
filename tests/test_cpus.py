"""The processors that a process may use: its affinity, and the quota of its control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeinf.cpus import usable_cpus

MINE = len(os.sched_getaffinity(0))


def asked(root: Path, membership: str, files: dict[str, str]) -> int:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(membership)
    for name, text in files.items():
        (root / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "groups" / name).write_text(text)
    return usable_cpus(str(root / "proc"), str(root / "groups"))


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/not/seen\n", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, MINE),
        ("0::/a\n", {"a/cpu.max": f"{MINE * 100000 - 1} 100000\n"}, MINE),
        ("0::/a\n", {"a/cpu.max": "9900000 100000\n"}, MINE),
        ("0::/a\n", {"a/cpu.max": "nonsense\n"}, MINE),
        ("0::/a\n", {}, MINE),
        (
            "4:memory:/m\n3:cpu,cpuacct:/c\n",
            {
                "cpu,cpuacct/c/cpu.cfs_quota_us": "50000\n",
                "cpu,cpuacct/c/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            "3:cpu,cpuacct:/c\n",
            {"cpu/c/cpu.cfs_quota_us": "-1\n", "cpu/c/cpu.cfs_period_us": "100000\n"},
            MINE,
        ),
        ("4:memory:/m\n", {"m/cpu.max": "1000 100000\n"}, MINE),
        ("", {}, MINE),
    ],
)  # fmt: skip
def test_quotas(tmp_path: Path, membership: str, files: dict[str, str], expected: int) -> None:
    assert asked(tmp_path, membership, files) == expected


def test_affinity() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from moeinf.cpus import usable_cpus; print(usable_cpus())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "1\n"
