"""Without a GPU, runs numerics/ under Triton's interpreter, in a process of its own."""

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
def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    # A thread per tensor operation only gets in the way of tensors this small.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "numerics")],
        env=environment,
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
