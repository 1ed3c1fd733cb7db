"""The GPU session reports every failed step and goes on; and parts of the GPU benchmarks."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from benchmarks import copy_gpu, ffn_gpu, random_checkpoint
from benchmarks.random_checkpoint import Geometry, folder_for

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_session.sh"
# Stands for Python: logs each call and fails where the call matches $FAIL.
STAND_IN = """#!/usr/bin/env bash
call="$* [$CMAKE_ARGS]"
echo "$call" >>"$LOG"
case "$*" in -c*) echo some-gpu ;; esac
[[ -z "$FAIL" || ! "$call" =~ $FAIL ]]
"""


def test_every_file_that_the_session_names_exists() -> None:
    script = SCRIPT.read_text()
    benchmarks = re.findall(r"-m benchmarks\.(\w+)", script)
    tests = re.findall(r"\btests/[\w/]+(?:\.py)?\b", script)
    assert benchmarks and tests
    for path in [f"benchmarks/{name}.py" for name in benchmarks] + tests:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("fail", "succeeds", "last_call"),
    [
        ("", True, "benchmarks.gpu_summary"),
        ("pytest.*test_cuda_real", False, "benchmarks.gpu_summary"),
        ("ffn_gpu --compile", False, "benchmarks.gpu_summary"),
        ("copy_gpu", False, "benchmarks.gpu_summary"),
        # A build with nvcc fails: the build without the gather kernel replaces it.
        (r"pip .*\[\]", True, "benchmarks.gpu_summary"),
        # Both builds fail: nothing can be measured.
        ("-m pip", False, "-m pip"),
    ],
)
def test_a_failed_step_shows_in_the_exit_status_and_stops_no_other_step(
    fail: str, succeeds: bool, last_call: str, tmp_path: Path
) -> None:
    stand_in, log, out = tmp_path / "python", tmp_path / "log", tmp_path / "out"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    settings = {"PYTHON": str(stand_in), "LOG": str(log), "FAIL": fail, "CMAKE_ARGS": ""}
    run = subprocess.run(
        [SCRIPT, out], env=os.environ | settings, stdin=subprocess.DEVNULL, capture_output=True
    )
    assert (run.returncode == 0) == succeeds, run.stderr
    assert last_call in log.read_text().splitlines()[-1]
    with tarfile.open(out / "logs-some-gpu.tar.gz") as archive:
        assert ("logs/copy_gpu.txt" in archive.getnames()) == (last_call != "-m pip")


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
