"""benchmarks/gpu_session.sh, Python played by a stand-in: a failure is said, and stops no other."""

from __future__ import annotations

import os
import subprocess
import tarfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from benchmarks import copy_gpu, ffn_gpu, random_checkpoint
from benchmarks.random_checkpoint import Geometry, folder_for

ROOT = Path(__file__).parent.parent
# Answers as Python would; what it was asked goes to the log, what matches FAIL fails.
STAND_IN = """#!/usr/bin/env bash
echo "$* [$CMAKE_ARGS]" >>"$LOG"
case "$*" in -c*) echo some-gpu ;; esac
[[ -z "$FAIL" || ! "$* [$CMAKE_ARGS]" =~ $FAIL ]]
"""


def session(folder: Path, fail: str = "") -> tuple[int, list[str], str]:
    """Exit status, what Python was asked, and what was printed."""
    stand_in, log = folder / "python", folder / "log"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    log.write_text("")
    environment = os.environ | {
        "PYTHON": str(stand_in), "LOG": str(log), "FAIL": fail, "CMAKE_ARGS": ""
    }  # fmt: skip
    run = subprocess.run(
        [ROOT / "benchmarks" / "gpu_session.sh", folder / "out"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return run.returncode, log.read_text().splitlines(), run.stdout + run.stderr


def test_all_steps_run(tmp_path: Path) -> None:
    status, asked, said = session(tmp_path)
    assert status == 0, said
    for benchmark in ("ffn_gpu --json", "copy_gpu --json", "decode_gpu --json", "gpu_summary"):
        assert sum(f"benchmarks.{benchmark}" in line for line in asked) == 1, benchmark
    assert sum("-m pytest" in line for line in asked) == 8
    assert sum("-m pip" in line for line in asked) == 1
    with tarfile.open(tmp_path / "out" / "logs-some-gpu.tar.gz") as logs:
        assert "logs/tests-cache.txt" in logs.getnames()
    assert not (tmp_path / "out" / "logs").exists()


@pytest.mark.parametrize("fail", ["pytest.*test_cuda_real", "ffn_gpu --compile", "copy_gpu"])
def test_a_step_that_fails_is_in_the_exit_status_and_stops_no_other(
    fail: str, tmp_path: Path
) -> None:
    status, asked, said = session(tmp_path, fail)
    assert status != 0 and "exit status 1" in said
    assert "benchmarks.gpu_summary" in asked[-1]


def test_an_nvcc_that_cannot_compile_costs_the_gather_kernel_alone(tmp_path: Path) -> None:
    status, asked, _ = session(tmp_path, r"pip .*\[\]")
    assert status == 0
    assert ["-DMOEINF_CUDA=OFF" in line for line in asked if "-m pip" in line] == [False, True]
    status, asked, _ = session(tmp_path, "pip")
    assert status != 0 and "-m pip" in asked[-1]


def test_what_the_profiler_adds_is_no_launch() -> None:
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        ("gate_up_vector", cuda), ("cuLaunchKernel", cpu), ("down_vector", cuda),
        ("Activity Buffer Request", cuda), ("Memset (Device)", cuda), ("Context Sync", cuda),
    ]  # fmt: skip
    assert ffn_gpu.count_launches(events) == 3


def test_a_checkpoint_lies_in_ram_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    geometry = Geometry(layers=1)
    assert geometry.expert_bytes == 128 * 9_437_184
    monkeypatch.setattr(random_checkpoint, "IN_RAM", tmp_path)
    available, free = 1 << 50, 1 << 40
    monkeypatch.setattr(random_checkpoint._core, "available_memory", lambda: available)
    monkeypatch.setattr(random_checkpoint.shutil, "disk_usage", lambda _: usage(free))
    assert folder_for(geometry) == tmp_path
    available = 3 * geometry.expert_bytes
    assert folder_for(geometry) is None
    available, free = 1 << 50, geometry.expert_bytes
    assert folder_for(geometry) is None
    free = 1 << 40
    monkeypatch.setattr(random_checkpoint, "IN_RAM", tmp_path / "none")
    assert folder_for(geometry) is None


def test_steps_of_misses_are_large_but_for_small_experts() -> None:
    for size in copy_gpu.SIZES:
        width = copy_gpu.experts_of(size) // 2
        assert width % copy_gpu.TOP_K == 0
        assert width == 32 or width * 6 * size[0] * size[1] >= copy_gpu.STEP_BYTES
