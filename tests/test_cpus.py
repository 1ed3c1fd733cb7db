"""The processors that a process may use: its affinity, and the quota of its control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moeinf
from moeinf.cpus import cpu_quota, numa_nodes, usable_cpus
from moeinf.experts import cpu

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


def test_a_quota_of_half_a_core_is_said_as_it_is(tmp_path: Path) -> None:
    files = {"a/cpu.max": "50000 100000\n"}
    assert asked(tmp_path, "0::/a\n", files) == 1
    assert cpu_quota(str(tmp_path / "proc"), str(tmp_path / "groups")) == 0.5


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({"node0": "0-4095\n"}, 1),
        ({"node0": "0-4095\n", "node1": "\n"}, 1),
        ({"node0": "0-4095\n", "node1": "4096,4098-5000\n"}, 1),
        ({"node0": f"{min(os.sched_getaffinity(0))}\n", "node1": "0-4095\n"}, 2),
        ({}, 1),
    ],
)
def test_numa_nodes(tmp_path: Path, lists: dict[str, str], expected: int) -> None:
    for name, text in lists.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(text)
    assert numa_nodes(str(tmp_path)) == expected


def test_the_number_of_threads_changes_no_bit(
    qwen3_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "usable_cpus", lambda: 3)  # more than cores: still the same bits
    prompt = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    logits = []
    try:
        for threads in (1, 2, 3):
            model = moeinf.load(qwen3_folder, device="cpu", slots=3, threads=threads)
            assert cpu.default_engine().threads == threads
            with torch.no_grad():
                logits.append([model(prompt).logits, model(prompt[:, :1]).logits])
    finally:
        monkeypatch.undo()
        monkeypatch.setattr(cpu, "_threads", None)
        cpu.default_engine.cache_clear()
    for other in logits[1:]:
        assert all(map(torch.equal, logits[0], other))


@pytest.mark.parametrize("threads", [0, -1, MINE + 1, 10**6])
def test_threads_that_cannot_all_run_are_refused(qwen3_folder: Path, threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads={threads}: expected 1 to [0-9]+, the proc"):
        moeinf.load(qwen3_folder, device="cpu", threads=threads)


def test_one_core_means_one_thread(qwen3_folder: Path) -> None:
    """Also where torch has been told otherwise, and a second one is refused."""
    code = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import torch, moeinf; torch.set_num_threads(4)\n"
        "moeinf.load(sys.argv[1], device='cpu')\n"
        "from moeinf.experts.cpu import default_engine, use_threads\n"
        "print(default_engine().threads)\n"
        "try: use_threads(2)\n"
        "except ValueError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(qwen3_folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [
        "1",
        "threads=2: expected 1 to 1, the processors that this process may use",
    ]
