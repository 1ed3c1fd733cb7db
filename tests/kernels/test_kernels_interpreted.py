"""Without a GPU, runs numerics/ under Triton's interpreter, each file in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU is here: numerics/ runs on it directly"
)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("numerics/test_*.py")))
def test_kernels_under_the_interpreter(file: str) -> None:
    pytest.importorskip("triton")
    # A thread per tensor operation only gets in the way of tensors this small.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "numerics" / file],
        env=environment,
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
