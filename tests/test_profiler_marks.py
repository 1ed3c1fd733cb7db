"""Ranges for profilers: NVTX ranges of the core in pairs, torch's marks only while it profiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from built_library import built_library
from fake_cuda_library import fake_cuda_library

import moeinf

ROOT = Path(__file__).parent.parent
STEPS = """
import sys, torch, moeinf
for device in ("cpu", "cuda"):
    cache = moeinf.ExpertCache(moeinf.ExpertStore.open(sys.argv[1]), device=device, slots=4)
    for layer in range(3):
        ids = torch.tensor([[0, 3, 5]])
        moeinf.fused_experts(torch.ones(1, 40), ids, torch.ones(1, 3), cache, layer)
    del cache
"""


def run_steps(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", STEPS, str(folder)],
        env=os.environ | {"MOEINF_CUDA_DRIVER": str(fake_cuda_library())} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )


def test_ranges_open_and_close_in_pairs(qwen3_folder: Path, tmp_path: Path) -> None:
    library = built_library(ROOT / "tests" / "fake_nvtx", "libnvToolsExt.so.1")
    log = tmp_path / "ranges"
    run_steps(qwen3_folder, LD_LIBRARY_PATH=str(library.parent), FAKE_NVTX_LOG=str(log))
    opened: dict[str, list[str]] = {}  # by thread
    seen: dict[str, int] = {}
    for line in log.read_text().splitlines():
        thread, _, name = line.partition(" ")
        if name:
            opened.setdefault(thread, []).append(name)
            seen[name] = seen.get(name, 0) + 1
        else:
            opened[thread].pop()  # fails where nothing is open
    assert not any(opened.values())
    assert seen["moeinf acquire"] == 6
    assert seen["moeinf router ids"] == 3
    assert seen["moeinf compute"] >= 3  # on the CPU; torch or Triton computes on a device
    assert seen["moeinf read"] >= 18
    assert seen["moeinf copy"] >= 3
    assert seen["moeinf wait"] >= 6


def test_nothing_is_needed_for_them(qwen3_folder: Path, tmp_path: Path) -> None:
    """A library of that name that is something else changes nothing."""
    (tmp_path / "libnvToolsExt.so.1").write_bytes(fake_cuda_library().read_bytes())
    run_steps(qwen3_folder, LD_LIBRARY_PATH=str(tmp_path))


@pytest.mark.parametrize(
    ("device", "marks"),
    [
        ("cpu", {"moeinf::acquire_and_compute"}),
        ("cuda", {"moeinf::acquire", "moeinf::compute"}),
    ],
)
def test_torch_profiles_the_parts_of_a_step(
    qwen3_folder: Path, device: str, marks: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEINF_CUDA_DRIVER", str(fake_cuda_library()))
    cache = moeinf.ExpertCache(moeinf.ExpertStore.open(qwen3_folder), device=device, slots=4)
    step = (torch.ones(1, 40), torch.tensor([[0, 3]]), torch.ones(1, 2), cache, 0)
    moeinf.fused_experts(*step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        moeinf.fused_experts(*step)
    found = {event.name for event in profile.events() if event.name.startswith("moeinf::")}
    assert found - {"moeinf::fused_experts"} == marks
