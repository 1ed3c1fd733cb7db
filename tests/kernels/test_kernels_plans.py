"""A call of a known signature launches exactly what Triton's own dispatch would, without a GPU.

Triton compiles and launches for an H100 with its own code; the driver under it only notes calls.
As a check of this test: a signature without strides, or without alignment, fails for every seed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("planned_launches.py")


@pytest.mark.timeout(300)
def test_planned_launches_are_those_of_triton(seed: int) -> None:
    pytest.importorskip("triton")
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(PROGRAM), str(seed)],
        cwd=PROGRAM.parent.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "are the same" in run.stdout
